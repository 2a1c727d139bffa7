"""Small transformers of PixArt-α and PixArt-Σ, and batches for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from mobius_train.conditions import MASK, SIZES, TEXT, Conditions

CONFIGS: dict[str, dict[str, Any]] = {
    # As of 512 px: with a variance.
    "pixart": {},
    # As PixArt-α of 1024 px: sizes are conditions; without a variance.
    "pixart-sizes": {"use_additional_conditions": True, "out_channels": 4},
}


def tiny_pixart(kind: str = "pixart", **changes: Any) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 4,
        "attention_head_dim": 12,
        "num_attention_heads": 4,
        "cross_attention_dim": 48,
        "caption_channels": 24,
    }
    return PixArtTransformer2DModel(**(sizes | CONFIGS[kind] | changes)).eval()


class PixArtBatch(NamedTuple):
    sample: Tensor
    """(B, C, F, H, W)"""
    timestep: Tensor
    """(B,)"""
    text: Tensor
    """(B, L, D)"""
    mask: Tensor
    """(B, L)"""
    sizes: Tensor
    """(B, 6)"""

    def given(self) -> tuple[Tensor, Tensor, Conditions]:
        """As `Denoiser.predict` takes them."""
        return self.sample, self.timestep, Conditions({TEXT: self.text, MASK: self.mask, SIZES: self.sizes})

    def pictures(self) -> dict[str, Any]:
        """The same as a batch of pictures, as PixArtTransformer2DModel takes them."""
        clips, _, frames = self.sample.shape[:3]
        height, width = self.sizes[:, 4], self.sizes[:, 5]
        return {
            "hidden_states": torch.stack([self.sample[b, :, f] for b in range(clips) for f in range(frames)]),
            "timestep": self.timestep.repeat_interleave(frames),
            "encoder_hidden_states": self.text.repeat_interleave(frames, 0),
            "encoder_attention_mask": self.mask.repeat_interleave(frames, 0),
            "added_cond_kwargs": {
                "resolution": torch.stack([height, width], 1).repeat_interleave(frames, 0),
                "aspect_ratio": (height / width)[:, None].repeat_interleave(frames, 0),
            },
        }


def pixart_batch(
    model: Any, clips: int = 2, frames: int = 3, size: tuple[int, int] = (8, 8), tokens: int = 5
) -> PixArtBatch:
    """The text of clip b has b tokens of padding."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    height, width = 8 * size[0], 8 * size[1]
    return PixArtBatch(
        torch.randn(clips, config.in_channels, frames, *size, generator=generator),
        torch.tensor([17.0, 801.5, 400.0, 950.0])[:clips],
        torch.randn(clips, tokens, config.caption_channels, generator=generator),
        torch.arange(tokens) < tokens - torch.arange(clips)[:, None],
        torch.tensor([[height, width, 0, 0, height, width]] * clips),
    )
