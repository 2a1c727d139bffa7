"""torch.compile for single layers: small graphs, compiled once per shape.

Inductor fuses what lies between matrix products and convolutions, such as a group norm and the activation behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# A run calls a layer with batches for training, held-out batches, the last and smaller one of these, and samples.
CALLS = 4


def compile_layers(
    layers: list[nn.Module],
    activation_memory_budget: float | None = None,
    backend: str = "inductor",
    shapes: int = 1,
    cuda_graphs: bool = False,
) -> None:
    """Compile every layer at its first call. Weight names do not change, and copies are not compiled.

    Args:
        activation_memory_budget: share of the activations that a layer saves for the backward pass, from 1 (the
            compiler's default) to 0 (its inputs only). The compiler recomputes the cheapest operators first. The
            setting is global: it applies to all later compilations in the process.
        backend: see torch.compile.
        shapes: number of shapes of a training batch.
        cuda_graphs: launch a layer as one CUDA graph, for layers that run without an autograd graph. Results are
            copied out of the graph's memory, so they live like other tensors.
    """
    if activation_memory_budget is not None:
        torch._functorch.config.activation_memory_budget = activation_memory_budget
    # The layers share their code, and dynamo limits compilations per code object: its default limits would leave most
    # layers uncompiled.
    most = len(layers) * shapes * CALLS
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)
    for layer in layers:
        layer.compile(backend=backend, mode="reduce-overhead" if cuda_graphs else None, dynamic=False)
        if cuda_graphs:
            layer._compiled_call_impl = _copied(layer._compiled_call_impl)  # type: ignore[arg-type]


def _copied(layer: Callable[..., Any]) -> Callable[..., Any]:
    """The layer with results that its next call does not overwrite."""
    return lambda *args, **kwargs: tree_map_only(Tensor, torch.clone, layer(*args, **kwargs))
