"""Selection of a clip's frames."""

from __future__ import annotations

import copy
import hashlib
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mobius_train.data.windows import FrameChoice, window_places, window_start
from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages.stage import Stage, drop_clip


class ChooseFrames(Stage):
    """`even` takes frames floor(i·n/count) of n; the others take windows of every `stride`-th frame.

    `head` is the first window, `random` one whose start depends on seed and key, `all` every window that does not
    overlap the one before, spread over the clip; each becomes a clip.
    """

    name: Literal["choose_frames"]
    count: int = Field(ge=1)
    how: Literal["even", "head", "random", "all"] = "even"
    stride: int = Field(1, ge=1)
    max_windows: int | None = Field(None, ge=1, description="how=all: windows of a clip, at most")
    seed: int = 0

    @model_validator(mode="after")
    def _options_fit(self) -> ChooseFrames:
        if self.stride > 1 and self.how == "even":
            raise ValueError(f"stride={self.stride} has no effect with how=even: use head, random or all")
        if self.max_windows is not None and self.how != "all":
            raise ValueError(f"max_windows={self.max_windows} has no effect with how={self.how}: use all")
        return self

    def apply(self, clips: list[Candidate]) -> list[Candidate]:
        return [taken for clip in clips for taken in (self._taken(clip) if clip.dropped is None else [clip])]

    def _taken(self, clip: Candidate) -> list[Candidate]:
        frames, fps, start = clip.pixels, clip.fps or 1.0, clip.start or 0.0
        total = len(frames)
        if FrameChoice(stride=self.stride).available(total) < self.count:
            drop_clip(clip, self.name, Dropped("too few frames", f"{total}"))
            return [clip]
        if self.how == "even":
            clip.frames = frames[[number * total // self.count for number in range(self.count)]]
            clip.fps = fps * self.count / total
            return [clip]
        starts = self._starts(clip.key, total)
        # Copies are of the record; each window gets its own frames.
        clip.frames = None
        windows = [clip] if len(starts) == 1 else [copy.deepcopy(clip) for _ in starts]
        for number, (window, first) in enumerate(zip(windows, starts, strict=True)):
            if len(starts) > 1:
                window.key = f"{clip.key}--window{number:03d}"
            window.frames = np.ascontiguousarray(frames[first :: self.stride][: self.count])
            window.fps = fps / self.stride
            window.start, window.end = start + first / fps, start + (first + (self.count - 1) * self.stride + 1) / fps
        return windows

    def _starts(self, key: str, total: int) -> list[int]:
        """The first frame of each window, of `total` frames."""
        if self.how == "head":
            return [0]
        if self.how == "random":
            digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
            return [int.from_bytes(digest[:8], "little") % (total - (self.count - 1) * self.stride)]
        available = FrameChoice(stride=self.stride).available(total)
        places = window_places(available, self.count, self.max_windows)
        return [window_start(place, total, self.count, self.stride) for place in places]
