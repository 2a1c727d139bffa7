from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import UNet2DConditionModel
from unets import tiny_unet

from mobius_train.errors import MobiusError
from mobius_train.models import ImageUNet, ParallelUNet, SerialUNet
from mobius_train.models.unet.backbone import UNetBackbone
from mobius_train.models.unet.check import check_unet

SIZES_AND_TEXT = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 1,
}


def test_common_kinds_are_backbones(unet: UNet2DConditionModel) -> None:
    check_unet(unet)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type='text_image'"),
        ({"addition_embed_type": "image", "encoder_hid_dim": 16}, "addition_embed_type='image'"),
        ({"addition_embed_type": "image_hint", "encoder_hid_dim": 16}, "addition_embed_type='image_hint'"),
        (SIZES_AND_TEXT | {"addition_time_embed_dim": None}, "addition_time_embed_dim"),
        (SIZES_AND_TEXT | {"projection_class_embeddings_input_dim": 6 * 8}, "projection_class_embeddings_input_dim=48"),
        ({"cross_attention_dim": (384, 384, 256)}, "cross_attention_dim"),
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
def test_unsupported_backbones_are_refused_by_name(changes: dict, named: str) -> None:
    unet = tiny_unet("emoji", **changes)
    makers: tuple[Callable[[UNet2DConditionModel], object], ...]
    makers = (ParallelUNet.from_unet2d, SerialUNet.from_unet2d, ImageUNet)
    for model in makers:
        with pytest.raises(MobiusError, match=named) as refusal:
            model(unet)
        assert "Stable Diffusion 1.x, 2.x (timestep and text) or XL" in str(refusal.value)


@pytest.mark.parametrize(("pooled", "kind"), [(20, "sdxl"), (1, "emoji")])
def test_condition_widths_are_those_of_the_embedding(pooled: int, kind: str) -> None:
    unet = tiny_unet(kind, **({} if kind == "sdxl" else SIZES_AND_TEXT))
    widths = UNetBackbone(unet).condition_widths
    assert widths == {"text": unet.config.cross_attention_dim, "pooled": pooled, "sizes": 6}
    assert unet.add_embedding.linear_1.in_features == widths["pooled"] + 6 * unet.config.addition_time_embed_dim
    assert UNetBackbone(tiny_unet("emoji")).condition_widths == {"text": 384}


def test_all_problems_are_named_at_once() -> None:
    unet = tiny_unet("emoji", num_class_embeds=10, dual_cross_attention=True)
    with pytest.raises(MobiusError, match=r"(?s)num_class_embeds.*dual_cross_attention"):
        check_unet(unet)
