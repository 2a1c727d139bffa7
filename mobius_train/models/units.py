"""Which modules of a model are gathered together where its weights are sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from torch import nn


def layer_units(model: nn.Module) -> list[list[nn.Module]]:
    """The (TC, TA) and (SC, SA) pairs and the samplers of a UNet, ring or autoencoder, each called as a whole.

    A pair is one unit: where the backward pass recomputes a layer, its weights are gathered once for both. What lies
    around the layers is small and in no unit, as is what comes first in a model: by that, `dtype` of diffusers'
    models says what they compute in.
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
