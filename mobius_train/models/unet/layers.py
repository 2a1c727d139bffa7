"""The layers of a 2D UNet in forward order, derived from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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


def _per_level(value: int | list[int] | tuple[int, ...], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)


def bytes_per_flop(layer: LayerShape) -> float:
    """Saved values per multiplication in a forward pass of TC and TA, up to a factor common to all layers.

    Both are proportional to frames and positions, which cancel. A TC saves the inputs of four norms, activations and
    3-tap convolutions, and of the projection in front. A TA saves 33 states of its width: norms, projections, q, k, v
    and results of two attentions, and a gated feed-forward layer four times as wide.
    """
    width = layer.channels
    projected = layer.in_channels if layer.in_channels != width else 0
    values, products = 12 * width + 3 * projected, 12 * width**2 + 3 * projected * width
    if layer.heads is not None:
        values, products = values + 33 * width, products + 22 * width**2
    return values / products
