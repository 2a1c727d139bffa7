"""Small transformers of Stable Diffusion 3 and 3.5, and batches for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from mobius_train.conditions import POOLED, TEXT, Conditions

CONFIGS: dict[str, dict[str, Any]] = {
    "sd3": {},
    # Normalised queries and keys, and a second attention in the first blocks.
    "sd35": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}


def tiny_sd3(kind: str = "sd3", **changes: Any) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 12,
    }
    return SD3Transformer2DModel(**(sizes | CONFIGS[kind] | changes)).eval()


class SD3Batch(NamedTuple):
    sample: Tensor
    """(B, C, F, H, W)"""
    timestep: Tensor
    """(B,)"""
    text: Tensor
    """(B, L, D)"""
    pooled: Tensor
    """(B, P)"""

    def given(self) -> tuple[Tensor, Tensor, Conditions]:
        """As `Denoiser.predict` takes them."""
        return self.sample, self.timestep, Conditions({TEXT: self.text, POOLED: self.pooled})

    def pictures(self) -> dict[str, Tensor]:
        """The same as a batch of pictures, as SD3Transformer2DModel takes them."""
        clips, _, frames = self.sample.shape[:3]
        return {
            "hidden_states": torch.stack([self.sample[b, :, f] for b in range(clips) for f in range(frames)]),
            "timestep": self.timestep.repeat_interleave(frames),
            "encoder_hidden_states": self.text.repeat_interleave(frames, 0),
            "pooled_projections": self.pooled.repeat_interleave(frames, 0),
        }


def sd3_batch(model: Any, clips: int = 2, frames: int = 3, size: tuple[int, int] = (8, 8), tokens: int = 5) -> SD3Batch:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    return SD3Batch(
        torch.randn(clips, config.in_channels, frames, *size, generator=generator),
        torch.tensor([17.0, 801.5, 400.0, 950.0])[:clips],
        torch.randn(clips, tokens, config.joint_attention_dim, generator=generator),
        torch.randn(clips, config.pooled_projection_dim, generator=generator),
    )
