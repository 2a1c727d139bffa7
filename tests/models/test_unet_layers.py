from __future__ import annotations

from itertools import zip_longest
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from unets import tiny_unet

from mobius_train.models import ParallelUNet
from mobius_train.models.backbone import LayerShape
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.unet.layers import read_layout, tail_bytes_per_flop, transformer_blocks


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


def test_a_tail_layer_costs_what_its_transformer_blocks_save() -> None:
    layer = LayerShape(2560, 1280, 20)
    # Width cancels but for SC: 3·2560 + 4·1280 values and 9·1280·3840 products.
    values, products = 3 * 2560 + 4 * 1280, 9 * 1280 * (2560 + 1280)
    assert tail_bytes_per_flop(layer, False) == (values + 33 * 1280) / (products + 22 * 1280**2)
    assert tail_bytes_per_flop(layer, False, 10) == (values + 303 * 1280) / (products + 202 * 1280**2)
    plain = tail_bytes_per_flop(layer._replace(heads=None), False)
    assert tail_bytes_per_flop(layer._replace(heads=None), False, 10) == plain


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
    assert model.ring.treatments == ("keep", "keep", "offload", *("keep",) * 4, "keep")
    # Saved and loaded it has the same configuration as before there were several blocks.
    assert not [name for name in model.ring.config if "transformer_layers" in name]
