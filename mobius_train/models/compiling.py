"""torch.compile for trained layers, one by one: small graphs, compiled once for each shape."""

from __future__ import annotations

import torch
from torch import nn


def compile_layers(
    layers: list[nn.Module], activation_memory_budget: float | None = None, backend: str = "inductor"
) -> None:
    """Let every layer compile itself at its first call. Names of weights stay, and copies are not compiled.

    Args:
        activation_memory_budget: what a layer saves for the backward pass, between 1 (all that the compiler would
            save) and 0 (its inputs); the compiler recomputes the cheapest operators first. It is a setting of the
            process: it holds for all that is compiled from now on.
        backend: see torch.compile.
    """
    if activation_memory_budget is not None:
        torch._functorch.config.activation_memory_budget = activation_memory_budget
    # They share their code, and dynamo counts compilations by code: the default would leave most layers uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(layers))
    for layer in layers:
        layer.compile(backend=backend, dynamic=False)
