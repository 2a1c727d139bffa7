"""Decoding of files to frames at a constant rate, by the decoder of training."""

from __future__ import annotations

import hashlib
from pathlib import PurePath
from typing import ClassVar, Literal

import cv2
import numpy as np
from PIL import Image
from pydantic import Field

from mobius_train.data.decode import DAMAGED, Timeline, decode_frames
from mobius_train.data.kinds import ENDINGS, kind_of
from mobius_train.data.limits import Limits, Undecodable
from mobius_train.data.timing import displayed_frames, frame_rate
from mobius_train.prepare.candidate import Candidate, Dropped, Frames
from mobius_train.prepare.stages.stage import ClipStage


class Decode(ClipStage):
    """All kinds of files, recognised by content, as viewers show them; transparent pixels become white.

    Frames are repeated or skipped according to their durations.
    """

    name: Literal["decode"]
    fps: float | None = Field(None, gt=0, le=60, description="null: the file's median rate")
    max_side: int | None = Field(None, ge=8, description="longer sides are scaled down to this while decoding")
    more_frames_than: int = Field(4, ge=0, description="files with this many frames or fewer are dropped undecoded")
    limits: Limits = Limits()
    needs_frames: ClassVar[bool] = False

    def process(self, clip: Candidate) -> None:
        if not clip.size:
            raise Dropped("empty")
        rates: list[float] = []

        def choose(timeline: Timeline) -> list[int]:
            durations = timeline.durations
            if len(durations) <= self.more_frames_than:
                raise Dropped("still" if len(durations) == 1 else "too few frames", f"{len(durations)}")
            if len(durations) > 1 and not any(durations[:-1]):
                raise Dropped("zero duration", "all frames have the same time")
            rates[:] = [self.fps or frame_rate(durations)]
            numbers = displayed_frames(durations, rates[0])
            self.limits.check(*self._size(timeline.width, timeline.height), len(numbers))
            return numbers

        try:
            self.limits.check_bytes(clip.size)
            data = clip.read()
            clip.sha256 = hashlib.sha256(data).hexdigest()
            kind = kind_of(data)
            suffix = PurePath(clip.origin.partition(" (")[0]).suffix.lower()
            if suffix not in ENDINGS[kind]:
                clip.notes.append(f"wrong extension: {kind} named {suffix}")
            frames, notes = decode_frames(data, self.limits, choose, self._resized)
        except Undecodable as error:
            raise Dropped(error.reason, error.detail) from error
        except DAMAGED as error:
            raise Dropped("damaged", error) from error
        clip.notes += notes
        clip.frames, clip.fps = np.stack(frames), rates[0]
        clip.start, clip.end = 0.0, len(frames) / rates[0]

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after scaling."""
        scale = 1.0 if self.max_side is None else min(1.0, self.max_side / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    def _resized(self, image: Image.Image) -> Frames:
        size = self._size(*image.size)
        if image.size == size:
            return np.asarray(image)
        return cv2.resize(np.asarray(image), size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
