"""Small 2D UNets of the common kinds, and batches for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from mobius_train.conditions import Conditions
from mobius_train.models import SerialUNet, TemporalLayers

CONFIGS: dict[str, dict[str, Any]] = {
    # Stable Diffusion 1.x: 1x1 convolutions as projections, a fixed number of heads.
    "sd1": {
        "block_out_channels": (32, 64, 64, 64),
        "norm_num_groups": 16,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    # Stable Diffusion 2.x: linear projections, heads of size 64.
    "sd2": {
        "block_out_channels": (64, 128, 128, 128),
        "layers_per_block": 1,
        "attention_head_dim": (1, 2, 2, 2),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    # Three levels, attention in all of them.
    "emoji": {
        "block_out_channels": (64, 96, 128),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 384,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
}


def tiny_unet(kind: str, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, **(CONFIGS[kind] | changes)).eval()


def serial_with_random_temporal_layers(unet: UNet2DConditionModel) -> SerialUNet:
    """A serial model that does mix frames, as a trained one does: nothing in it is zeroed."""
    return SerialUNet(unet, TemporalLayers.from_unet2d(unet)).eval()


class Batch(NamedTuple):
    sample: Tensor
    """(B, C, F, H, W)"""
    timestep: Tensor
    """(B,)"""
    text: Tensor
    """(B, L, D)"""

    def given(self) -> tuple[Tensor, Tensor, Conditions]:
        """As `Denoiser.predict` takes them."""
        return self.sample, self.timestep, Conditions.of_text(self.text)

    def frames(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same as a batch of pictures: (B·F, C, H, W), (B·F,), (B·F, L, D)."""
        clips, channels, frames, *size = self.sample.shape
        pictures = torch.stack([self.sample[b, :, f] for b in range(clips) for f in range(frames)])
        assert pictures.shape == (clips * frames, channels, *size)
        return pictures, self.timestep.repeat_interleave(frames), self.text.repeat_interleave(frames, 0)


def batch_for(unet: UNet2DConditionModel, clips: int = 2, frames: int = 3, size: tuple[int, int] = (8, 8)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(clips, unet.config.in_channels, frames, *size, generator=generator),
        torch.tensor([17, 801, 400])[:clips],
        torch.randn(clips, 5, unet.config.cross_attention_dim, generator=generator),
    )
