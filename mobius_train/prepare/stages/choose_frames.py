"""Selection of a clip's frames."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from pydantic import Field

from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages.stage import ClipStage


class ChooseFrames(ClipStage):
    """`even` takes frames floor(i·n/count) of n, `head` the first frames, `random` consecutive frames.

    The start of the random frames depends on seed and key.
    """

    name: Literal["choose_frames"]
    count: int = Field(ge=1)
    how: Literal["even", "head", "random"] = "even"
    seed: int = 0

    def process(self, clip: Candidate) -> None:
        frames, fps, start = clip.pixels, clip.fps or 1.0, clip.start or 0.0
        total = len(frames)
        if total < self.count:
            raise Dropped("too few frames", f"{total}")
        first = self._first(clip.key, total)
        if self.how == "even":
            clip.frames = frames[[number * total // self.count for number in range(self.count)]]
            clip.fps = fps * self.count / total
        else:
            clip.frames = np.ascontiguousarray(frames[first : first + self.count])
            clip.start, clip.end = start + first / fps, start + (first + self.count) / fps

    def _first(self, key: str, total: int) -> int:
        if self.how != "random":
            return 0
        digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % (total - self.count + 1)
