"""The latent space of an autoencoder: its shape and scale.

Legend: F frames, H, W pixels; c, h, w latent channels and size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
