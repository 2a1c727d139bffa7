"""Shuffled frames: a control that keeps every picture and destroys the motion."""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor


def shuffled(frames: Tensor, key: str) -> Tensor:
    """The frames (F, …), F > 1, in another order, drawn by the clip's key."""
    generator = torch.Generator().manual_seed(crc32(key.encode()))
    while True:
        order = torch.randperm(len(frames), generator=generator)
        if not torch.equal(order, torch.arange(len(frames))):
            return frames[order]
