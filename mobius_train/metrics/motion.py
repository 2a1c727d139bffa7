"""Motion of clips, from their pixels alone.

`frame_difference` is too small for stills and too large for flicker. `neighbour_ratio` distinguishes motion from
flicker: steady motion accumulates, so frames half a clip apart differ more than neighbours (a ratio below 1). For
independent changes the ratio is 1. `frame_order` compares neighbours with all pairs of frames. `motion_correlation`
compares a clip with a reference clip of the same caption.

Legend: F frames, H, W pixels.
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
        `frame_difference` of adjacent frames, `half_clip_difference` of frames F // 2 apart, and `neighbour_ratio`,
        the first mean over the second (0 if all clips are stills).

    Raises:
        ValueError: there are no clips.
    """
    pairs = [(frame_difference(frames), frame_difference(frames, len(frames) // 2)) for frames in clips]
    if not pairs:
        raise ValueError("motion needs at least one clip")
    neighbours, halves = (mean(column) for column in zip(*pairs, strict=True))
    return {
        "frame_difference": neighbours,
        "half_clip_difference": halves,
        "neighbour_ratio": neighbours / halves if halves else 0.0,
    }


def deviation(frames: Tensor) -> Tensor:
    """Each frame minus the clip's mean frame, float32; the frame axis is the first."""
    frames = frames.float()
    return frames - frames.mean(0, keepdim=True)


def frame_order(frames: Tensor) -> float | None:
    """Mean squared difference of adjacent frames over that of all pairs: below 1 if neighbours are alike.

    The mean over all orders of the same frames is exactly 1, so 1 is the value of a clip without order.

    Args:
        frames: (F, 3, H, W) uint8 with F > 1.

    Returns:
        None if all frames are equal.

    Raises:
        ValueError: there is only one frame.
    """
    if len(frames) < 2:
        raise ValueError(f"frame_order needs more than one frame, got {tuple(frames.shape)}")
    steps = (frames[1:].float() - frames[:-1].float()).square().sum() / (len(frames) - 1)
    # The mean over all pairs of |x_f - x_g|^2 is twice the unbiased variance.
    pairs = 2 * deviation(frames).square().sum() / (len(frames) - 1)
    return float(steps / pairs) if pairs > 0 else None


def motion_correlation(frames: Tensor, reference: Tensor) -> float:
    """Cosine of the deviations of two clips from their mean frames: 1 for equal motion, near 0 for unrelated motion.

    Args:
        frames, reference: (F, 3, H, W) uint8, of equal shape.

    Returns:
        0 if one of the clips is a still.

    Raises:
        ValueError: the shapes differ.
    """
    if frames.shape != reference.shape:
        raise ValueError(
            f"motion_correlation needs clips of one shape, got {tuple(frames.shape)} and {tuple(reference.shape)}"
        )
    ours, theirs = deviation(frames).double().flatten(), deviation(reference).double().flatten()
    scale = ours.norm() * theirs.norm()
    return float(ours @ theirs / scale) if scale > 0 else 0.0
