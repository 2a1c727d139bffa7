"""How much a clip moves: the mean absolute difference of its frames.

Samples whose figure is far below the data's are stills; far above, they flicker. Motion goes on from frame to frame, so
over half a clip it adds up; where frames differ at random, the figure is the same over any distance.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

import torch
from torch import Tensor


def frame_difference(frames: Tensor, distance: int = 1) -> float:
    """Mean |x_{f+d} - x_f| over frames, channels and pixels of one clip, in grey levels (0 to 255).

    Args:
        frames: (F, 3, H, W) uint8.
        distance: d, in frames, less than F.

    Raises:
        ValueError: too few frames, or not uint8.
    """
    if frames.ndim != 4 or len(frames) <= distance or frames.dtype != torch.uint8:
        raise ValueError(
            f"frame_difference wants more than {distance} uint8 frames (F, 3, H, W),"
            f" got {tuple(frames.shape)} {frames.dtype}"
        )
    return (frames[distance:].float() - frames[:-distance].float()).abs().mean().item()


def motion(clips: Iterable[Tensor]) -> dict[str, float]:
    """The figures of some clips, each (F, 3, H, W) uint8 with F > 1; every clip counts the same.

    Returns:
        `frame_difference` of neighbouring frames, `half_clip_difference` of frames F // 2 apart.

    Raises:
        ValueError: no clip.
    """
    pairs = [(frame_difference(frames), frame_difference(frames, len(frames) // 2)) for frames in clips]
    if not pairs:
        raise ValueError("the motion of no clips")
    neighbours, halves = zip(*pairs, strict=True)
    return {"frame_difference": mean(neighbours), "half_clip_difference": mean(halves)}
