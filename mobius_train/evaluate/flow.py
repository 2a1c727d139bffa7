"""Dimensions of optical flow by OpenCV's DIS. They are modelled on VBench's, which use networks with weights.

Their names differ from VBench's because their numbers do.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import numpy as np

from mobius_train.evaluate.clips import EvaluatedClip
from mobius_train.evaluate.dimension import Dimension, Unmeasured
from mobius_train.media.pixels import to_arrays
from mobius_train.metrics.optical_flow import dis_flow, fastest_speed, middle_frame

RATE = 8.0  # frames per second at which VBench measures the dynamic degree
SPEED = 6.0 / 256  # of the shorter side, per frame: a pair of frames moves above this


class SmoothnessDis(Dimension):
    """VBench's motion smoothness with frames interpolated along DIS flow instead of by AMT."""

    name = "smoothness_dis"
    meaning = "1 - mean |odd frame - its interpolation from the even frames beside it| / 255"
    better = "higher"
    best_for_stills = True
    shuffled_control = True

    def measure(self, clip: EvaluatedClip) -> float:
        if len(clip.frames) < 3:
            raise Unmeasured("fewer than 3 frames")
        frames = to_arrays(clip.frames)
        errors = [
            np.abs(middle_frame(frames[number - 1], frames[number + 1]) - frames[number]).mean()
            for number in range(1, len(frames) - 1, 2)
        ]
        return 1 - float(np.mean(errors)) / 255


class SpeedDis(Dimension):
    name = "speed_dis"
    meaning = "mean speed of the fastest 5 % of the pixels, in shorter sides per second"
    better = "neither"

    def measure(self, clip: EvaluatedClip) -> float:
        return mean(_speeds(clip, step=1)) * clip.fps


class DynamicDis(Dimension):
    """VBench's dynamic degree with DIS flow instead of RAFT's: 1 for a clip that moves, else 0."""

    name = "dynamic_dis"
    meaning = "share of clips that move: at 8 frames/s, a quarter of the pairs is faster than 6/256 of the shorter side"
    better = "neither"

    def measure(self, clip: EvaluatedClip) -> float:
        step = max(1, round(clip.fps / RATE))
        speeds = _speeds(clip, step)
        frames = len(speeds) + 1
        if frames < 2:
            raise Unmeasured(f"shorter than two frames at {RATE:g} frames/s")
        # VBench counts frames, not pairs; below 2 frames a quarter rounds to 0 pairs, which every clip has.
        return float(sum(speed > SPEED for speed in speeds) >= max(1, round(4 * frames / 16)))


def _speeds(clip: EvaluatedClip, step: int) -> list[float]:
    """Speeds of the fastest pixels between every `step`-th frame and the next, in shorter sides per frame."""
    frames = to_arrays(clip.frames[::step])
    side = min(frames.shape[1:3])
    return [fastest_speed(dis_flow(before, after)) / side for before, after in pairwise(frames)]
