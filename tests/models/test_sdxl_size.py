"""The ring at the size of Stable Diffusion XL: one clip of 8 frames of 512 px, in bf16, with fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from autograd_memory import step
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mobius_train.conditions import Conditions
from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import build_denoiser
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.unet.backbone import UNetBackbone

pytestmark = pytest.mark.slow

GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def _fake_tensors_in_bf16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ).eval()


def given() -> tuple[Tensor, Tensor, Conditions]:
    conditions = {
        "text": torch.randn(1, 77, 2048),
        "pooled": torch.randn(1, 1280),
        "sizes": torch.zeros(1, 6, dtype=torch.long),
    }
    return torch.randn(1, 4, 8, 64, 64), torch.tensor([3]), Conditions(conditions)


def test_it_is_xl(unet: UNet2DConditionModel) -> None:
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(2567e6, abs=1e6)
    assert UNetBackbone(unet).condition_widths == {"text": 2048, "pooled": 1280, "sizes": 6}


@pytest.mark.parametrize(
    ("shape", "millions", "saved", "recomputed", "tflop"),
    [
        ({}, 499.2, 6.650, 0.510, 25.14),
        ({"ring_width": 0.5, "fusion_depth": 1, "tail_temporal_layers": True}, 140.6, 4.350, 0.484, 16.86),
    ],
    ids=["paper", "half, depth 1, tail"],
)
def test_ring(
    unet: UNet2DConditionModel, shape: dict[str, Any], millions: float, saved: float, recomputed: float, tflop: float
) -> None:
    """GiB saved for the backward pass, as a whole and with every layer recomputed; TFLOP of both passes."""
    model: Any = build_denoiser(unet, "text-to-video", "parallel", shape)
    assert sum(p.numel() for p in model.ring.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)
    kept = step(lambda: model.predict(*given()), model)
    assert kept.saved.total / GIB == pytest.approx(saved, rel=0.01)
    assert kept.forward + kept.backward == pytest.approx(tflop, rel=0.01)
    model.set_memory(LayerMemory(gradient_checkpointing=True))
    found = saved_for_backward(lambda: model.predict(*given()), {"": model})[1]
    assert found.total / GIB == pytest.approx(recomputed, rel=0.02)
    # In front of the tail no spatial layer saves anything.
    behind = [f"spatial.up_blocks.{3 - depth}" for depth in range(1, model.ring_shape.fusion_depth + 1)]
    assert [n for n in found.tensors if n.startswith("spatial.") and not n.startswith(tuple(behind))] == []
