"""The frozen autoencoder, which maps pixels to latents and back, and its latent space.

Legend: B clips, F frames, H, W pixels; c, h, w latent channels and size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mobius_train.devices import sent
from mobius_train.sequence.group import SequenceGroup
from mobius_train.sequence.split import bounds, gathered

# The summation order of kernels depends on the batch size, so this number is part of a cached latent's identity and is
# used for all encoding.
FRAMES_AT_ONCE = 8
# Decoding takes fewer frames at once if they are large: one of 512 x 512 pixels takes 0.8 GB.
PIXELS_DECODED_AT_ONCE = 512 * 512


@dataclass(frozen=True)
class LatentSpace:
    """The latent space of an autoencoder.

    Attributes:
        channels: c.
        reduction: H / h and W / w.
        scale, shift: a denoiser's input is (z - shift) · scale.
        frames_at_once: most frames in one call of the autoencoder, which bounds the memory for long clips.
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
    def posterior(self, frames: Tensor, sequence: SequenceGroup | None = None) -> Posterior:
        """Encode one clip, uint8 (F, 3, H, W).

        Clips are not batched: the summation order of kernels depends on the batch size, and the cache must be
        bit-identical to online encoding.

        Args:
            sequence: ranks that all encode this clip; each encodes some of its frames.
        """

        def encode(part: Tensor) -> Tensor:
            latents = self.vae.encode(to_pixels(sent(part, self.device))).latent_dist
            return torch.stack([latents.mean, latents.std], dim=1)

        channels, _, *size = self.space.shape(len(frames), *frames.shape[-2:])
        parts = frames.split(self.space.frames_at_once)
        mean, std = self._of_parts(parts, encode, (2, channels, *size), sequence).unbind(1)
        return Posterior(mean.contiguous(), std.contiguous())

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """z = (mean + std · noise - shift) · scale, the denoiser's input, for any shape."""
        return self.space.scaled(mean + std * noise)

    @torch.no_grad()
    def decode(self, latents: Tensor, sequence: SequenceGroup | None = None) -> Tensor:
        """Decode latents (B, c, F, h, w) to uint8 frames (B, F, 3, H, W) on the CPU.

        Args:
            sequence: ranks that all decode these latents; each decodes some of the frames.
        """
        folded = latents.transpose(1, 2).flatten(0, 1).to(self.device, torch.float32)
        folded = self.space.unscaled(folded)
        height, width = (side * self.space.reduction for side in latents.shape[-2:])
        at_once = min(self.space.frames_at_once, max(1, PIXELS_DECODED_AT_ONCE // (height * width)))
        parts = folded.split(at_once)
        pixels = self._of_parts(parts, lambda part: self.vae.decode(part).sample, (3, height, width), sequence)
        return to_frames(pixels).unflatten(0, (latents.shape[0], latents.shape[2])).cpu()

    def _of_parts(
        self,
        parts: Sequence[Tensor],
        run: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        sequence: SequenceGroup | None,
    ) -> Tensor:
        """Run the autoencoder on parts of (F, …), of which each rank takes some; a result has `shape` for a frame."""
        if sequence is None:
            return torch.cat([run(part) for part in parts])
        of_ranks = [parts[start:stop] for start, stop in pairwise(bounds(len(parts), sequence.size))]
        nothing = torch.empty((0, *shape), device=self.device)
        own = torch.cat([nothing, *(run(part) for part in of_ranks[sequence.rank])])
        return gathered(sequence, own, [sum(map(len, of_rank)) for of_rank in of_ranks])
