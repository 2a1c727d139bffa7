"""Motion of a clip: the mean absolute difference of its frames.

Samples with a value far below the data's are stills; samples far above it flicker. Steady motion accumulates, so the
difference over half a clip is larger than between adjacent frames. For random differences, the value is the same over
any distance.
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
            f"frame_difference needs more than {distance} uint8 frames (F, 3, H, W),"
            f" got {tuple(frames.shape)} {frames.dtype}"
        )
    return (frames[distance:].float() - frames[:-distance].float()).abs().mean().item()


def motion(clips: Iterable[Tensor]) -> dict[str, float]:
    """Motion metrics averaged over clips, each (F, 3, H, W) uint8 with F > 1.

    Returns:
        `frame_difference` of adjacent frames, `half_clip_difference` of frames F // 2 apart.

    Raises:
        ValueError: there are no clips.
    """
    pairs = [(frame_difference(frames), frame_difference(frames, len(frames) // 2)) for frames in clips]
    if not pairs:
        raise ValueError("motion needs at least one clip")
    neighbours, halves = zip(*pairs, strict=True)
    return {"frame_difference": mean(neighbours), "half_clip_difference": mean(halves)}
