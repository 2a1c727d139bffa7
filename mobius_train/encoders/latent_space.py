"""The latent space of an autoencoder: its shape and scale.

Legend: F frames, H, W pixels; c, h, w latent channels and size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Frames at once. Kernels choose another summation order for another batch, so this number is part of a cached latent's
# identity, and is the same wherever frames are encoded or decoded.
FRAMES_AT_ONCE = 8


@dataclass(frozen=True)
class LatentSpace:
    """Where an autoencoder puts images.

    Attributes:
        channels: c.
        reduction: H / h and W / w.
        scale, shift: latents that a denoiser sees are (z - shift) · scale.
        frames_at_once: frames that the autoencoder encodes or decodes in one call, so that long clips fit the memory.
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
        """(c, F, h, w) of a clip of so many frames and pixels."""
        return (self.channels, num_frames, height // self.reduction, width // self.reduction)

    def scaled(self, latents: Tensor) -> Tensor:
        """From what the autoencoder gives to what a denoiser sees, any shape."""
        return (latents - self.shift) * self.scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return latents / self.scale + self.shift
