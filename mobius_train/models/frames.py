"""Conversion between clips and batches of frames.

Legend: B clips, C channels, F frames, H, W latent size; the B·F frames are ordered clip by clip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobius_train.conditions import Conditions
from mobius_train.errors import MobiusError

Timestep = Tensor | float | int


def fold_frames(sample: Tensor) -> Tensor:
    """(B, C, F, H, W) → (B·F, C, H, W).

    Raises:
        MobiusError: the tensor does not have five axes.
    """
    if sample.ndim != 5:
        raise MobiusError(
            f"latents must be (batch, channels, frames, height, width), got {tuple(sample.shape)}."
            " Give a still image a frame axis of size 1: sample.unsqueeze(2)"
        )
    return sample.permute(0, 2, 1, 3, 4).flatten(0, 1)


def unfold_frames(frames: Tensor, num_frames: int) -> Tensor:
    """(B·F, C, H, W) → (B, C, F, H, W)."""
    return frames.unflatten(0, (-1, num_frames)).permute(0, 2, 1, 3, 4)


def fold_conditions(timestep: Timestep, conditions: Conditions, num_frames: int) -> tuple[Timestep, Conditions]:
    """Repeat a clip's conditions for each of its frames.

    Args:
        timestep: a number, or a tensor of shape (), (1,) or (B,).
        conditions: of B clips.

    Returns:
        The timestep, (B·F,) or a single number, and the conditions of B·F frames.
    """
    if torch.is_tensor(timestep) and timestep.ndim > 0:
        timestep = timestep.expand(len(conditions)).repeat_interleave(num_frames)
    return timestep, conditions.repeat_frames(num_frames)
