"""Dynamic degree: how far the fastest things of a clip move, by dense optical flow.

The mean of the largest 5% of flow is VBench's measure (https://arxiv.org/abs/2311.17982, dynamic degree), there with
RAFT; here OpenCV's DIS flow (https://arxiv.org/abs/1603.03590), which needs no weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
from pydantic import Field

from mobius_train.prepare.clip import Clip, Dropped
from mobius_train.prepare.stages.stage import ClipStage

FASTEST = 0.05


@lru_cache(maxsize=1)
def _flow() -> Any:
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)


class Dynamics(ClipStage):
    """Scores `degree`: pixels a second at `width`, the mean over `pairs` of neighbouring frames evenly chosen."""

    name: Literal["dynamics"]
    width: int = Field(128, ge=16, description="pixels that frames are scaled to")
    pairs: int = Field(8, ge=1)
    minimum: float = Field(0.0, ge=0)
    maximum: float | None = Field(None, gt=0)

    def process(self, clip: Clip) -> None:
        frames, fps = clip.pixels, clip.fps or 1.0
        if len(frames) < 2:
            raise Dropped("still")
        steps = len(frames) - 1
        chosen = sorted({number * steps // self.pairs for number in range(min(self.pairs, steps))})
        size = (self.width, max(16, round(frames.shape[1] * self.width / frames.shape[2])))
        fastest = []
        for number in chosen:
            before, after = (
                cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
                for frame in frames[number : number + 2]
            )
            speeds = np.sort(np.linalg.norm(_flow().calc(before, after, None), axis=2), axis=None)
            fastest.append(float(speeds[-max(1, int(len(speeds) * FASTEST)) :].mean()))
        degree = float(np.mean(fastest)) * fps
        clip.scores[self.name] = {"degree": round(degree, 3)}
        if degree < self.minimum:
            raise Dropped("too little motion", f"{degree:.2f}")
        if self.maximum is not None and degree > self.maximum:
            raise Dropped("too much motion", f"{degree:.2f}")
