"""torch.compile for each trained layer: small graphs, compiled once per shape."""

from __future__ import annotations

import torch
from torch import nn


def compile_layers(
    layers: list[nn.Module], activation_memory_budget: float | None = None, backend: str = "inductor"
) -> None:
    """Compile every layer at its first call. Weight names do not change, and copies are not compiled.

    Args:
        activation_memory_budget: share of the activations that a layer saves for the backward pass, from 1 (the
            compiler's default) to 0 (its inputs only). The compiler recomputes the cheapest operators first. The
            setting is global: it applies to all later compilations in the process.
        backend: see torch.compile.
    """
    if activation_memory_budget is not None:
        torch._functorch.config.activation_memory_budget = activation_memory_budget
    # The layers share their code, and dynamo limits compilations per code object: its default limit would leave most
    # layers uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(layers))
    for layer in layers:
        layer.compile(backend=backend, dynamic=False)
