"""Small 2D UNets of the common kinds, and batches for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from mobius_train.conditions import POOLED, SIZES, TEXT, Conditions
from mobius_train.models import SerialUNet, TemporalLayers

CONFIGS: dict[str, dict[str, Any]] = {
    # Stable Diffusion 1.x: two layers a level, 1x1 convolutions as projections, a fixed number of heads.
    "sd1": {
        "block_out_channels": (16, 32, 32, 32),
        "norm_num_groups": 8,
        "layers_per_block": 2,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
    },
    # Stable Diffusion 2.x: linear projections, heads of one size.
    "sd2": {
        "block_out_channels": (32, 64, 64, 64),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "attention_head_dim": (1, 2, 2, 2),
        "cross_attention_dim": 40,
        "use_linear_projection": True,
    },
    # Three levels, attention in all of them; takes the text of MiniLM.
    "emoji": {
        "block_out_channels": (32, 48, 64),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 384,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    # Stable Diffusion XL: no attention in the first level, more transformer blocks in the others, added conditions.
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 48,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 2, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
}


def tiny_unet(kind: str, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, **(CONFIGS[kind] | changes)).eval()


def serial_with_random_temporal_layers(unet: UNet2DConditionModel) -> SerialUNet:
    """A serial model that does mix frames, as a trained one does: nothing in it is zeroed."""
    return SerialUNet(unet, TemporalLayers.from_unet2d(unet)).eval()


class Frames(NamedTuple):
    """A batch of pictures, as a `Walk` takes them."""

    pictures: Tensor
    """(N, C, H, W)"""
    timestep: Tensor
    """(N,)"""
    conditions: Conditions
    """of N pictures"""

    def at(self, n: int) -> Frames:
        """Picture n alone."""
        conditions = {name: tensor[n : n + 1] for name, tensor in self.conditions.tensors.items()}
        return Frames(self.pictures[n : n + 1], self.timestep[n : n + 1], Conditions(conditions))

    def by(self, unet: UNet2DConditionModel) -> Tensor:
        """The prediction of diffusers' UNet, (N, C, H, W)."""
        return unet(
            self.pictures, self.timestep, self.conditions[TEXT], added_cond_kwargs=in_diffusers(self.conditions)
        ).sample


class Batch(NamedTuple):
    sample: Tensor
    """(B, C, F, H, W)"""
    timestep: Tensor
    """(B,)"""
    conditions: Conditions
    """of B clips"""

    @property
    def text(self) -> Tensor:
        """(B, L, D)"""
        return self.conditions[TEXT]

    def given(self) -> tuple[Tensor, Tensor, Conditions]:
        """As `Denoiser.predict` takes them."""
        return self.sample, self.timestep, self.conditions

    def by(self, model: Any) -> Tensor:
        """The prediction of a text-to-video model, ours or diffusers', by its call signature: (B, C, F, H, W)."""
        added = in_diffusers(self.conditions)
        more = {"added_cond_kwargs": added} if added else {}
        return model(self.sample, self.timestep, self.conditions[TEXT], **more).sample

    def frames(self) -> Frames:
        """The same as a batch of B·F pictures."""
        clips, channels, frames, *size = self.sample.shape
        pictures = torch.stack([self.sample[b, :, f] for b in range(clips) for f in range(frames)])
        assert pictures.shape == (clips * frames, channels, *size)
        conditions = {name: tensor.repeat_interleave(frames, 0) for name, tensor in self.conditions.tensors.items()}
        return Frames(pictures, self.timestep.repeat_interleave(frames), Conditions(conditions))


def in_diffusers(conditions: Conditions) -> dict[str, Tensor]:
    """The added conditions, as the pipelines of diffusers give them."""
    if POOLED not in conditions.tensors:
        return {}
    return {"text_embeds": conditions[POOLED], "time_ids": conditions[SIZES]}


def batch_for(unet: UNet2DConditionModel, clips: int = 2, frames: int = 3, size: tuple[int, int] = (8, 8)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(clips, unet.config.in_channels, frames, *size, generator=generator)
    conditions = {TEXT: torch.randn(clips, 5, unet.config.cross_attention_dim, generator=generator)}
    if unet.config.get("addition_embed_type"):
        conditions[POOLED] = torch.randn(clips, 20, generator=generator)
        conditions[SIZES] = torch.tensor([[1023, 768, 0, 37, 512, 384], [480, 641, 5, 0, 512, 512]] * 2)[:clips]
    return Batch(sample, torch.tensor([17, 801, 400])[:clips], Conditions(conditions))
