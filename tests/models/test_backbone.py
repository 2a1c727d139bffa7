from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import UNet2DConditionModel
from unets import tiny_unet

from mobius_train.errors import MobiusError
from mobius_train.models import ImageUNet, ParallelUNet, SerialUNet
from mobius_train.models.unet.check import check_unet


def test_common_kinds_are_backbones(unet: UNet2DConditionModel) -> None:
    check_unet(unet)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 64,
            },
            "addition_embed_type",
        ),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"encoder_hid_dim": 16}, "encoder_hid_dim"),
        ({"time_cond_proj_dim": 16}, "time_cond_proj_dim"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"attention_type": "gated"}, "attention_type"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
        (
            {"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D")},
            "AttnDownBlock2D",
        ),
        (
            {"up_block_types": ("SimpleCrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
            "SimpleCrossAttnUpBlock2D",
        ),
    ],
)
@pytest.mark.parametrize("model", [ParallelUNet.from_unet2d, SerialUNet.from_unet2d, ImageUNet])
def test_unsupported_backbones_are_refused_by_name(
    model: Callable[[UNet2DConditionModel], object], changes: dict, named: str
) -> None:
    unet = tiny_unet("emoji", **changes)
    with pytest.raises(MobiusError, match=named) as refusal:
        model(unet)
    assert "Stable Diffusion 1.x, 2.x" in str(refusal.value)


def test_all_problems_are_named_at_once() -> None:
    unet = tiny_unet("emoji", num_class_embeds=10, dual_cross_attention=True)
    with pytest.raises(MobiusError, match=r"(?s)num_class_embeds.*dual_cross_attention"):
        check_unet(unet)
