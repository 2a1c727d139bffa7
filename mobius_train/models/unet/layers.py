"""The layers of a 2D UNet in forward order, derived from its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mobius_train.errors import MobiusError
from mobius_train.models.backbone import LayerShape


class Layout(NamedTuple):
    """The layers of each block. On each side, all blocks except the last end in a down- or upsampler."""

    down: list[list[LayerShape]]
    mid: list[LayerShape]
    up: list[list[LayerShape]]
    in_heads: int
    """Attention heads of the first level, even if its layers have no attention."""

    def layers(self) -> list[LayerShape]:
        """All layers in forward order."""
        return [shape for block in (*self.down, self.mid, *self.up) for shape in block]


# The entries of UNet2DConditionModel's configuration that `read_layout` reads.
LAYOUT_FIELDS = (
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
)


def read_layout(config: Mapping[str, Any]) -> Layout:
    """The layers that diffusers builds from these `LAYOUT_FIELDS`.

    As in UNet2DConditionModel, `attention_head_dim` is the number of heads despite its name.
    """
    channels = list(config["block_out_channels"])
    levels = len(channels)
    heads = _per_level(config["attention_head_dim"], levels)
    depths = _per_level(config["layers_per_block"], levels)

    down = []
    for level, kind in enumerate(config["down_block_types"]):
        before = channels[max(level - 1, 0)]
        attention = heads[level] if "CrossAttn" in kind else None
        inputs = [before] + [channels[level]] * (depths[level] - 1)
        down.append([LayerShape(entering, channels[level], attention) for entering in inputs])

    last = channels[-1]
    has_mid = config["mid_block_type"] is not None
    mid = [LayerShape(last, last, heads[-1]), LayerShape(last, last, None)] if has_mid else []

    up = []
    before = last
    for level, kind in zip(reversed(range(levels)), config["up_block_types"], strict=True):
        width = channels[level]
        attention = heads[level] if "CrossAttn" in kind else None
        # One bridge from every layer of the down block, and a last one from its input.
        bridges = [width] * depths[level] + [channels[max(level - 1, 0)]]
        states = [before] + [width] * depths[level]
        up.append([LayerShape(state + bridge, width, attention) for state, bridge in zip(states, bridges, strict=True)])
        before = width
    return Layout(down, mid, up, heads[0])


def split_layout(layout: Layout, fusion_depth: int) -> tuple[Layout, list[list[LayerShape]]]:
    """The layers in front of the fusion, and the last `fusion_depth` up blocks.

    Raises:
        MobiusError: there are not so many.
    """
    blocks = len(layout.up)
    if not 0 <= fusion_depth <= blocks:
        fitting = ", ".join(map(str, range(blocks + 1)))
        raise MobiusError(f"fusion_depth={fusion_depth}: this UNet has {blocks} up blocks. Depths that fit: {fitting}")
    before = blocks - fusion_depth
    return layout._replace(up=layout.up[:before]), layout.up[before:]


def scaled_channels(config: Mapping[str, Any], width: float) -> list[int]:
    """Channels of each level of a ring of this width.

    Raises:
        MobiusError: the width does not fit: the channels of a level are no whole number, or not divisible by its heads.
    """
    channels = config["block_out_channels"]
    if not _fits(config, width):
        fitting = [f"{w:g}" for w in (2, 1.5, 1, 0.75, 0.5, 0.25, 0.125) if _fits(config, w)]
        heads = _per_level(config["attention_head_dim"], len(channels))
        raise MobiusError(
            f"ring_width={width:g} does not fit a UNet with {', '.join(map(str, channels))} channels and"
            f" {', '.join(map(str, heads))} heads: the channels of each level, times the width, must be a multiple of"
            f" its heads. Widths that fit: {', '.join(fitting)}"
        )
    return [int(level * width) for level in channels]


def ring_groups(config: Mapping[str, Any], width: float) -> int:
    """The groups of a ring's norms: as many channels in each as in the UNet, where that divides."""
    channels = scaled_channels(config, width)
    return math.gcd(max(1, int(config["norm_num_groups"] * width)), *channels)


def scaled_layout(config: Mapping[str, Any], width: float) -> Layout:
    """The layers of a ring of this width, with the heads of the UNet's layers.

    Raises:
        MobiusError: the width does not fit.
    """
    return read_layout({**config, "block_out_channels": scaled_channels(config, width)})


def _fits(config: Mapping[str, Any], width: float) -> bool:
    channels = config["block_out_channels"]
    heads = _per_level(config["attention_head_dim"], len(channels))
    return width > 0 and all(c * width % n == 0 for c, n in zip(channels, heads, strict=True))


def transformer_blocks(config: Mapping[str, Any]) -> list[list[int]]:
    """Number of transformer blocks in the SA of each layer of each up block; without a meaning where there is no SA."""
    depths = _per_level(config["layers_per_block"], len(config["block_out_channels"]))
    per_level = _per_level(config["transformer_layers_per_block"], len(depths))
    per_up_block = config["reverse_transformer_layers_per_block"] or list(reversed(per_level))
    return [_per_level(blocks, depth + 1) for blocks, depth in zip(per_up_block, reversed(depths), strict=True)]


def _per_level(value: int | list[int] | tuple[int, ...], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)


def bytes_per_flop(layer: LayerShape) -> float:
    """Saved values per multiplication in a forward pass of TC and TA, up to a factor common to all layers.

    Both are proportional to frames and positions, which cancel. A projection in front of TC is a norm, an activation
    and a 3-tap convolution.
    """
    width = layer.channels
    projected = layer.in_channels if layer.in_channels != width else 0
    values, products = _temporal_costs(width, layer.heads is not None)
    if projected:
        values, products = values + 3 * projected + width, products + 3 * projected * width
    return values / products


def tail_bytes_per_flop(layer: LayerShape, temporal: bool, trained: bool = False, blocks: int = 1) -> float:
    """As `bytes_per_flop`, for a layer behind the fusion.

    A frozen layer does not save the inputs of its projections. An SC has two norms, activations and 3x3 convolutions,
    and a 1x1 convolution if the channels change. An SA is as a TA, but its second attentions are over the text, whose
    keys cost little.

    Args:
        temporal: the layer has a TC and a TA.
        trained: SC and SA are trained.
        blocks: number of transformer blocks in SA. A TA has one.
    """
    width, entering = layer.channels, layer.in_channels
    values, products = 3 * (entering + width), 9 * width * (entering + width)
    if entering != width:
        products += entering * width
    if layer.heads is not None:
        # Frozen projections around the blocks save 1 state if they are linear, 3 if they are convolutions.
        saved = 3 + 28 * blocks if trained else 2 + 21 * blocks
        values, products = values + saved * width, products + (2 + 18 * blocks) * width**2
    if temporal:
        of_temporal = _temporal_costs(width, layer.heads is not None)
        values, products = values + of_temporal[0], products + of_temporal[1]
    return values / products


def _temporal_costs(width: int, attention: bool) -> tuple[int, int]:
    """Saved values and multiplications of a TC, and of a TA if there is one, for each position.

    A TC has four norms, activations and 3-tap convolutions, and a copy of its input. A TA has a norm, two projections,
    and a block of three norms, two attentions and a gated feed-forward layer four times as wide.
    """
    values, products = 13 * width, 12 * width**2
    return (values + 34 * width, products + 22 * width**2) if attention else (values, products)
