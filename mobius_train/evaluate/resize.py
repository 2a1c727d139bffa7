"""Frames as inputs of an encoder, resized as VBench does: torchvision's Resize on float tensors without antialiasing.

Legend: F frames, H, W pixels, S the encoder's side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate


class Resize(NamedTuple):
    """side: S, to which the shorter side is scaled. crop: centre-crop to S x S. mean, std: of channels in [0, 1]."""

    side: int
    mode: Literal["bilinear", "bicubic"]
    crop: bool
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, frames: Tensor) -> Tensor:
        """Convert uint8 (F, 3, H, W) to normalised float32 (F, 3, S, S); without `crop` the longer side is kept."""
        height, width = frames.shape[-2:]
        size = [int(self.side * side / min(height, width)) for side in (height, width)]
        pixels = interpolate(frames.float(), size, mode=self.mode, align_corners=False, antialias=False)
        if self.crop:
            top, left = (round((side - self.side) / 2) for side in size)
            pixels = pixels[..., top : top + self.side, left : left + self.side]
        mean, std = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std
