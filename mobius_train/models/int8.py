"""Frozen layers whose weights take eight bits each.

A weight W of an output channel is stored as q = round(W / s), with s = max |W| / 127 over the channel, and the layer
computes with q · s. For weights that are distributed normally this changes them by one percent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LARGEST = 127


@torch.no_grad()
def store_in_int8(layers: Iterable[nn.Module]) -> None:
    """Store the weights of all linear layers and convolutions inside as int8. They are expanded at each use.

    Scales have the dtype of the weights, in which the layers go on to compute. Layers that compute the scale and shift
    of a norm keep their weights, because results are sensitive to these; diffusers' layerwise casting spares them too.

    Args:
        layers: modules that run without gradients.
    """
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and "norm" not in name:
                _store(module)


def _store(module: nn.Linear | nn.Conv2d) -> None:
    weight = module.weight
    # A scale rounded to the dtype loses nothing more when weights are expanded.
    scale = (weight.float().flatten(1).abs().amax(1) / LARGEST).to(weight.dtype)
    # A channel of zeros.
    scale = torch.where(scale == 0, 1, scale).view(-1, *[1] * (weight.ndim - 1))
    whole = (weight.float() / scale.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    module.weight = nn.Parameter(whole, requires_grad=False)
    # `unsafe` allows another dtype.
    parametrize.register_parametrization(module, "weight", _Expanded(scale), unsafe=True)


class _Expanded(nn.Module):
    """q → q · s, in the dtype of s."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, whole: Tensor) -> Tensor:
        scale = cast(Tensor, self.scale)
        return whole.to(scale.dtype) * scale
