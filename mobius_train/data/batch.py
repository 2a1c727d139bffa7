"""Batches of the loader, before and after the frozen encoders.

Legend: B clips, F frames, H, W pixels; c, h, w latent channels and size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mobius_train.conditions import Conditions
from mobius_train.data.clips import Clip
from mobius_train.devices import sent


class EncodedClip(NamedTuple):
    """One clip after the frozen encoders.

    mean, std: (F, c, h, w), the autoencoder's posterior of every frame, before scaling.
    conditions: those of the caption.
    variants: those of the clip's other captions; filled for a cache, empty in a sample.
    """

    key: str
    mean: Tensor
    std: Tensor
    conditions: Conditions
    variants: tuple[Conditions, ...] = ()

    def frame(self, number: int) -> EncodedClip:
        """A clip with this single frame."""
        selected = slice(number, number + 1)
        return self._replace(mean=self.mean[selected], std=self.std[selected])


@dataclass(frozen=True)
class ClipBatch:
    """sample_index: (B,), position in the run's infinite sample order; frames: (B, F, 3, H, W) uint8."""

    sample_index: Tensor
    keys: list[str]
    captions: list[str]
    frames: Tensor

    def describe(self) -> str:
        """Its number of clips, and their bucket."""
        clips, frames, _, height, width = self.frames.shape
        return f"{clips} clip(s) of {frames} frame(s) of {width}x{height} pixels"

    @classmethod
    def collate(cls, samples: list[tuple[int, Clip]]) -> ClipBatch:
        return cls(
            torch.tensor([index for index, _ in samples]),
            [clip.key for _, clip in samples],
            [clip.caption for _, clip in samples],
            torch.stack([clip.frames for _, clip in samples]),
        )

    def pin_memory(self) -> ClipBatch:
        """A copy in pinned host memory, for torch's loader."""
        return replace(self, frames=self.frames.pin_memory())


@dataclass(frozen=True)
class EncodedBatch:
    """sample_index: (B,); mean, std: (B, c, F, h, w), the axis order of video models; conditions: those of B clips."""

    sample_index: Tensor
    keys: list[str]
    mean: Tensor
    std: Tensor
    conditions: Conditions

    def describe(self) -> str:
        """Its number of clips, and their bucket in latents."""
        clips, _, frames, height, width = self.mean.shape
        return f"{clips} clip(s) of {frames} frame(s) of {width}x{height} latents"

    @classmethod
    def collate(cls, samples: list[tuple[int, EncodedClip]]) -> EncodedBatch:
        clips = [clip for _, clip in samples]
        return cls(
            torch.tensor([index for index, _ in samples]),
            [clip.key for clip in clips],
            torch.stack([clip.mean for clip in clips]).transpose(1, 2).contiguous(),
            torch.stack([clip.std for clip in clips]).transpose(1, 2).contiguous(),
            Conditions.stack([clip.conditions for clip in clips]),
        )

    def to(self, device: torch.device) -> EncodedBatch:
        """A copy with tensors on `device`. The sample indices are not moved."""
        return self._with(lambda tensor: sent(tensor, device))

    def pin_memory(self) -> EncodedBatch:
        """A copy in pinned host memory, for torch's loader."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> EncodedBatch:
        mean, std = change(self.mean), change(self.std)
        return replace(self, mean=mean, std=std, conditions=self.conditions.map(change))
