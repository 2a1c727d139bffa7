"""The units of a sharded model: groups of modules whose weights are gathered together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from torch import nn


def layer_units(model: nn.Module) -> list[list[nn.Module]]:
    """The (TC, TA) and (SC, SA) pairs and the samplers of a UNet, ring or autoencoder.

    A pair is one unit, so recomputation gathers the weights of a layer once for both modules. Modules outside the
    layers are small and belong to no unit. A model's first parameter is one of them, so that `dtype` of diffusers'
    models reports the compute dtype.
    """
    return [unit for block in model.modules() for unit in _units(block)]


def _units(block: Any) -> Iterator[list[nn.Module]]:
    pairs: Any = ()
    if hasattr(block, "temp_convs"):
        pairs = block.layers()
    elif isinstance(getattr(block, "resnets", None), nn.ModuleList):
        pairs = zip_longest(block.resnets, getattr(block, "attentions", None) or ())
    for pair in pairs:
        yield [module for module in pair if module is not None]
    for samplers in ("downsamplers", "upsamplers"):
        for sampler in getattr(block, samplers, None) or ():
            yield [sampler]
