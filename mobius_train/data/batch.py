"""What the loader hands to the training step, before and after the frozen encoders.

Legend: B clips, F frames, H, W pixels; c, h, w latent channels and size; L text tokens, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mobius_train.data.clips import Clip


class EncodedClip(NamedTuple):
    """One clip as the frozen encoders see it.

    mean, std: (F, c, h, w), the autoencoder's posterior of every frame, before scaling.
    text: (L, D), the caption's embedding.
    variants: of the clip's further captions, where it has several, for a cache; a sample has one.
    """

    key: str
    mean: Tensor
    std: Tensor
    text: Tensor
    variants: tuple[Tensor, ...] = ()

    def frame(self, number: int) -> EncodedClip:
        """A clip of that frame alone."""
        one = slice(number, number + 1)
        return self._replace(mean=self.mean[one], std=self.std[one])


@dataclass(frozen=True)
class ClipBatch:
    """sample_index: (B,) position in the run's endless sample order; frames: (B, F, 3, H, W) uint8."""

    sample_index: Tensor
    keys: list[str]
    captions: list[str]
    frames: Tensor

    @classmethod
    def collate(cls, samples: list[tuple[int, Clip]]) -> ClipBatch:
        return cls(
            torch.tensor([index for index, _ in samples]),
            [clip.key for _, clip in samples],
            [clip.caption for _, clip in samples],
            torch.stack([clip.frames for _, clip in samples]),
        )


@dataclass(frozen=True)
class EncodedBatch:
    """sample_index: (B,); mean, std: (B, c, F, h, w), channels first as the video models want; text: (B, L, D)."""

    sample_index: Tensor
    keys: list[str]
    mean: Tensor
    std: Tensor
    text: Tensor

    @classmethod
    def collate(cls, samples: list[tuple[int, EncodedClip]]) -> EncodedBatch:
        return cls(
            torch.tensor([index for index, _ in samples]),
            [clip.key for _, clip in samples],
            torch.stack([clip.mean for _, clip in samples]).transpose(1, 2).contiguous(),
            torch.stack([clip.std for _, clip in samples]).transpose(1, 2).contiguous(),
            torch.stack([clip.text for _, clip in samples]),
        )

    def to(self, device: torch.device) -> EncodedBatch:
        """The same batch with its tensors on `device`; the sample indices stay where they are."""
        return replace(self, mean=self.mean.to(device), std=self.std.to(device), text=self.text.to(device))
