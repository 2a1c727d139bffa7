"""Conversion of clips, uint8 (F, 3, H, W), to the inputs of file writers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

CLIP_SIDE = 192  # pixels; smaller GIF and MP4 frames are enlarged to at least this


def enlarge_frames(frames: Tensor, side: int) -> Tensor:
    """Enlarge (..., H, W) by the smallest integer factor that makes the shorter side at least `side` pixels."""
    factor = max(1, -(-side // min(frames.shape[-2:])))
    return frames.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def to_arrays(frames: Tensor) -> NDArray[np.uint8]:
    """Convert uint8 (F, 3, H, W) to (F, H, W, 3).

    Raises:
        ValueError: the frames have another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"a clip must be uint8 (F, 3, H, W), got {tuple(frames.shape)} {frames.dtype}")
    return frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_images(frames: Tensor) -> list[Image.Image]:
    """Convert uint8 (F, 3, H, W) to RGB images; raises as `to_arrays`."""
    return [Image.fromarray(frame) for frame in to_arrays(frames)]
