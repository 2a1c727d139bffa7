"""The frozen autoencoder, which maps pixels to latents and back, and its latent space.

Legend: B clips, F frames, H, W pixels; c, h, w latent channels and size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor

# The summation order of kernels depends on the batch size, so this number is part of a cached latent's identity and is
# used for all encoding and decoding.
FRAMES_AT_ONCE = 8


@dataclass(frozen=True)
class LatentSpace:
    """The latent space of an autoencoder.

    Attributes:
        channels: c.
        reduction: H / h and W / w.
        scale, shift: a denoiser's input is (z - shift) · scale.
        frames_at_once: number of frames in one call of the autoencoder, which bounds the memory for long clips.
    """

    channels: int
    reduction: int
    scale: float
    shift: float
    frames_at_once: int = FRAMES_AT_ONCE

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LatentSpace:
        """The latent space of diffusers' AutoencoderKL with this configuration."""
        return cls(
            channels=int(config["latent_channels"]),
            reduction=2 ** (len(config["block_out_channels"]) - 1),
            scale=float(config["scaling_factor"]),
            shift=float(config.get("shift_factor") or 0.0),
        )

    def shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latent shape (c, F, h, w) of a clip."""
        return (self.channels, num_frames, height // self.reduction, width // self.reduction)

    def scaled(self, latents: Tensor) -> Tensor:
        """Convert the autoencoder's latents to the denoiser's, for any shape."""
        return (latents - self.shift) * self.scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return latents / self.scale + self.shift


class Posterior(NamedTuple):
    """mean, std: (F, c, h, w), float32, before scaling."""

    mean: Tensor
    std: Tensor


def to_pixels(frames: Tensor) -> Tensor:
    """Convert uint8 frames of any shape to float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1.0


def to_frames(pixels: Tensor) -> Tensor:
    """Convert float pixels in [-1, 1] to uint8."""
    return ((pixels.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


class ImageEncoder:
    """A frozen AutoencoderKL in float32 (that of Stable Diffusion overflows in float16).

    Attributes:
        space: its latent space.
    """

    def __init__(self, vae: AutoencoderKL, device: torch.device) -> None:
        # channels_last is twice as fast on CPUs, and the layout that tensor cores use.
        self.vae = vae.requires_grad_(False).eval().to(device, torch.float32, memory_format=torch.channels_last)
        self.space = LatentSpace.of(vae.config)

    @property
    def device(self) -> torch.device:
        """The autoencoder's current device."""
        return self.vae.device

    @torch.no_grad()
    def posterior(self, frames: Tensor) -> Posterior:
        """Encode one clip, uint8 (F, 3, H, W).

        Clips are not batched: the summation order of kernels depends on the batch size, and the cache must be
        bit-identical to online encoding.
        """
        parts = [
            self.vae.encode(to_pixels(part.to(self.device))).latent_dist
            for part in frames.split(self.space.frames_at_once)
        ]
        return Posterior(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """z = (mean + std · noise - shift) · scale, the denoiser's input, for any shape."""
        return self.space.scaled(mean + std * noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, c, F, h, w) to uint8 frames (B, F, 3, H, W) on the CPU."""
        folded = latents.transpose(1, 2).flatten(0, 1).to(self.device, torch.float32)
        folded = self.space.unscaled(folded)
        pixels = torch.cat([self.vae.decode(part).sample for part in folded.split(self.space.frames_at_once)])
        return to_frames(pixels).unflatten(0, (latents.shape[0], latents.shape[2])).cpu()
