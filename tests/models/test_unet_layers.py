from __future__ import annotations

from itertools import zip_longest
from typing import Any

from diffusers import UNet2DConditionModel
from unets import tiny_unet

from mobius_train.models.backbone import LayerShape
from mobius_train.models.unet.layers import read_layout


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
