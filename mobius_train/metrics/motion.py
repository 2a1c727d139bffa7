"""How much a clip moves: the mean absolute difference of neighbouring frames.

Samples whose figure is far below the data's are stills; far above, they flicker.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def frame_difference(frames: Tensor) -> float:
    """Mean |x_{f+1} - x_f| over frames, channels and pixels of one clip, in grey levels (0 to 255).

    Args:
        frames: (F, 3, H, W) uint8.

    Raises:
        ValueError: fewer than two frames, or not uint8.
    """
    if frames.ndim != 4 or frames.shape[0] < 2 or frames.dtype != torch.uint8:
        raise ValueError(
            f"frame_difference wants two or more uint8 frames (F, 3, H, W), got {tuple(frames.shape)} {frames.dtype}"
        )
    return frames.float().diff(dim=0).abs().mean().item()


def mean_frame_difference(clips: Iterable[Tensor]) -> float:
    """The mean of frame_difference over clips, each (F, 3, H, W) uint8. Every clip counts the same.

    Raises:
        ValueError: no clip.
    """
    differences = [frame_difference(frames) for frames in clips]
    if not differences:
        raise ValueError("mean_frame_difference of no clips")
    return sum(differences) / len(differences)
