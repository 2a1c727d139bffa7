from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from unets import tiny_unet

from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import ParallelUNet
from mobius_train.models.backbone import LayerShape
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.unet.layers import bytes_per_flop, read_layout, tail_bytes_per_flop, transformer_blocks
from mobius_train.models.unet.serial_layer import serial_layer
from mobius_train.models.unet.temporal import TemporalConv, temporal_attention
from mobius_train.sequence.split import WHOLE


def layers_built(block: Any) -> list[LayerShape]:
    return [
        LayerShape(
            resnet.in_channels,
            resnet.out_channels,
            None if attention is None else attention.config.num_attention_heads,
        )
        for resnet, attention in zip_longest(block.resnets, getattr(block, "attentions", ()))
    ]


def assert_layout_is_what_diffusers_built(unet: UNet2DConditionModel) -> None:
    layout = read_layout(unet.config)
    assert layout.down == [layers_built(block) for block in unet.down_blocks]
    assert layout.up == [layers_built(block) for block in unet.up_blocks]
    assert layout.mid == ([] if unet.mid_block is None else layers_built(unet.mid_block))


def test_layout_is_what_diffusers_built(unet: UNet2DConditionModel) -> None:
    assert_layout_is_what_diffusers_built(unet)


def test_layout_with_uneven_depths_and_no_mid_block() -> None:
    unet = tiny_unet("emoji", layers_per_block=(1, 3, 2), attention_head_dim=(2, 3, 4), mid_block_type=None)
    assert_layout_is_what_diffusers_built(unet)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"transformer_layers_per_block": 2},
        {"layers_per_block": (1, 3, 2)},
        {
            "transformer_layers_per_block": [1, [2], [3]],
            "reverse_transformer_layers_per_block": [[3, 1], [1, 2], 1],
        },
    ],
)
def test_transformer_blocks_are_what_diffusers_built(changes: dict) -> None:
    unet = tiny_unet("sdxl", **changes)
    counted = transformer_blocks(unet.config)
    assert [len(blocks) for blocks in counted] == [len(block.resnets) for block in unet.up_blocks]
    for block, counts in zip(unet.up_blocks, counted, strict=True):
        built = [len(attention.transformer_blocks) for attention in getattr(block, "attentions", ())]
        assert built in ([], counts)


WIDTH, FRAMES, SIDE = 128, 4, 4


def measured(modules: list[nn.Module | None], entering: int, forward: Callable[[Tensor], Tensor]) -> float:
    """Values that real modules save for the backward pass, over their multiplications."""
    sample = torch.randn(2 * FRAMES, entering, SIDE, SIDE, requires_grad=True).mul(1)
    model = nn.ModuleList([module for module in modules if module is not None])
    saved = saved_for_backward(lambda: forward(sample), {"": model})[1].total
    with FlopCounterMode(display=False) as flops:
        forward(sample)
    return saved / 4 / (flops.get_total_flops() / 2)


@pytest.mark.parametrize("entering", [WIDTH, 2 * WIDTH])
@pytest.mark.parametrize("attention", [False, True], ids=["TC", "TC+TA"])
def test_the_costs_of_a_layer_of_the_ring_are_those_of_real_modules(entering: int, attention: bool) -> None:
    conv = TemporalConv(entering, WIDTH, 8)
    attend = temporal_attention(WIDTH, 2, 8) if attention else None

    def forward(sample: Tensor) -> Tensor:
        state = conv(sample, FRAMES)
        return state if attend is None else attend(state, FRAMES)

    found = measured([conv, attend], entering, forward)
    assert bytes_per_flop(LayerShape(entering, WIDTH, 2 if attention else None)) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("entering", [WIDTH, 2 * WIDTH])
@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_costs_of_a_layer_of_the_tail_are_those_of_real_modules(
    entering: int, blocks: int, temporal: bool, trained: bool
) -> None:
    resnet = ResnetBlock2D(in_channels=entering, out_channels=WIDTH, temb_channels=8, groups=8).requires_grad_(trained)
    attention: Any = None
    if blocks:
        attention = Transformer2DModel(
            2,
            WIDTH // 2,
            in_channels=WIDTH,
            num_layers=blocks,
            norm_num_groups=8,
            cross_attention_dim=8,
            use_linear_projection=True,
        ).requires_grad_(trained)
    conv = TemporalConv(WIDTH, WIDTH, 8) if temporal else None
    attend = temporal_attention(WIDTH, 2, 8) if temporal and blocks else None
    time, text = torch.randn(2 * FRAMES, 8), torch.randn(2 * FRAMES, 1, 8)

    def forward(sample: Tensor) -> Tensor:
        return serial_layer(conv, attend, FRAMES, WHOLE, resnet, attention, sample, None, time, text).hidden

    found = measured([resnet, attention, conv, attend], entering, forward)
    layer = LayerShape(entering, WIDTH, 2 if blocks else None)
    assert tail_bytes_per_flop(layer, temporal, trained, blocks) == pytest.approx(found, rel=0.06)
    # The controls: with another number of blocks the formula is wrong, and with the other kind.
    if blocks and not temporal:
        assert tail_bytes_per_flop(layer, temporal, trained, 4 - blocks) != pytest.approx(found, rel=0.06)
        assert tail_bytes_per_flop(layer, temporal, not trained, blocks) != pytest.approx(found, rel=0.06)


def test_transformer_blocks_of_layers_without_attention_cost_nothing() -> None:
    layer = LayerShape(2560, 1280, None)
    assert tail_bytes_per_flop(layer, False, blocks=10) == tail_bytes_per_flop(layer, False)


def test_the_ring_knows_how_deep_the_tails_attention_is() -> None:
    """Of two layers that differ in transformer blocks alone, the deeper one costs more per FLOP."""
    changes = {
        "transformer_layers_per_block": [1, [1], [1]],
        "reverse_transformer_layers_per_block": [[1, 9], [1, 1], 1],
        "block_out_channels": (128, 128, 128),
        "attention_head_dim": 2,
    }
    model = ParallelUNet.from_unet2d(tiny_unet("sdxl", **changes), 0, 3, True)
    model.set_memory(LayerMemory(activation_offload=1 / 6))
    # Without a ring there is no entry: the six layers, and the head.
    assert model.ring.treatments == ("keep", "offload", *("keep",) * 4, "keep")
    # Saved and loaded it has the same configuration as before there were several blocks.
    assert not [name for name in model.ring.config if "transformer_layers" in name]
