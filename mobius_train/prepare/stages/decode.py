"""Decoding of files to frames at a constant rate. The file type is detected from the content, not the name."""

from __future__ import annotations

import hashlib
import warnings
from itertools import pairwise
from pathlib import PurePath
from typing import ClassVar, Literal

import cv2
import numpy as np
from PIL import Image
from pydantic import Field

from mobius_train.data.decode import (
    DAMAGED,
    Limits,
    Undecodable,
    packet_times,
    picture_frames,
    picture_header,
    video_frames,
)
from mobius_train.prepare.candidate import Candidate, Dropped, Frames
from mobius_train.prepare.sources.reference import ENDINGS
from mobius_train.prepare.stages.stage import ClipStage
from mobius_train.prepare.timing import as_browsers, displayed_frames, frame_rate

DEMUXERS = ("mov", "matroska", "avi")
MAX_LOST = 0.1  # largest share of a video's frames that may fail to decode


class Decode(ClipStage):
    """GIF, WebP, APNG and stills with Pillow, video with PyAV; transparent pixels become white.

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
        try:
            self.limits.check_bytes(clip.size)
            data = clip.read()
            clip.sha256 = hashlib.sha256(data).hexdigest()
            kind = _sniff(data)
            suffix = PurePath(clip.origin.partition(" (")[0]).suffix.lower()
            if suffix not in ENDINGS[kind]:
                clip.notes.append(f"wrong extension: {kind} named {suffix}")
            frames, fps = self._video(data, kind) if kind in DEMUXERS else self._picture(clip, data)
        except Undecodable as error:
            raise Dropped(error.reason, error.detail) from error
        except DAMAGED as error:
            raise Dropped("damaged", error) from error
        clip.frames, clip.fps = frames, fps
        clip.start, clip.end = 0.0, len(frames) / fps

    def _check_count(self, count: int) -> None:
        if count <= self.more_frames_than:
            raise Dropped("still" if count == 1 else "too few frames", f"{count}")

    def _picture(self, clip: Candidate, data: bytes) -> tuple[Frames, float]:
        header = picture_header(data, self.limits)
        self._check_count(header.num_frames)
        canvas = (header.width, header.height)
        size = self._size(*canvas)
        frames, durations, sizes = [], [], set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for image, duration in picture_frames(data, range(header.num_frames), self.limits):
                sizes.add(image.size)
                frames.append(_resized(np.asarray(_padded(image, canvas)), size))
                durations.append(duration)
        if len(sizes) > 1:
            clip.notes.append("canvas changes")
        if len(frames) > 1 and not any(durations):
            clip.notes.append("zero duration")
        times = as_browsers(durations)
        fps = self.fps or frame_rate(times)
        numbers = displayed_frames(times, fps)
        self.limits.check(*size, len(numbers))
        return np.stack([frames[number] for number in numbers]), fps

    def _video(self, data: bytes, demuxer: str) -> tuple[Frames, float]:
        starts = packet_times(data, demuxer, self.limits)
        self._check_count(len(starts))
        durations = [1000 * (after - before) for before, after in pairwise(starts)]
        if len(starts) > 1 and not any(duration > 0 for duration in durations):
            raise Dropped("zero duration", "all frames have the same time")
        positive = [duration for duration in durations if duration > 0] or [1000.0]
        durations.append(1000 / frame_rate(positive))  # containers do not reliably store the last frame's end
        fps = self.fps or frame_rate(positive)
        return self._frames_at(data, demuxer, starts[0], sum(durations) / 1000, fps, len(starts)), fps

    def _frames_at(self, data: bytes, demuxer: str, start: float, seconds: float, fps: float, packets: int) -> Frames:
        """The frames displayed in the middle of each 1/fps seconds; other frames are not kept in memory."""
        count = max(1, round(seconds * fps))
        frames: list[Frames] = []
        current, decoded, size = None, 0, (0, 0)
        for frame in video_frames(data, demuxer, self.limits):
            time = start + decoded / fps if frame.time is None else frame.time
            if current is None:
                size = self._size(frame.width, frame.height)
                self.limits.check(*size, count)
            while current is not None and len(frames) < count and start + (len(frames) + 0.5) / fps < time:
                frames.append(_resized(current.to_ndarray(format="rgb24"), size))
            current, decoded = frame, decoded + 1
        if current is None:
            raise Dropped("no picture", "no frame can be decoded")
        if decoded < (1 - MAX_LOST) * packets:
            raise Dropped("damaged", f"only {decoded} of {packets} frames can be decoded")
        last = _resized(current.to_ndarray(format="rgb24"), size)
        return np.stack([*frames, *[last] * (count - len(frames))])

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after scaling."""
        scale = 1.0 if self.max_side is None else min(1.0, self.max_side / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))


def _sniff(data: bytes) -> str:
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] == b"RIFF":
        if data[8:12] == b"WEBP":
            return "webp"
        if data[8:12] == b"AVI ":
            return "avi"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    raise Dropped("unknown kind", f"it starts with {data[:8]!r}")


def _padded(image: Image.Image, canvas: tuple[int, int]) -> Image.Image:
    """Pad a GIF frame to the canvas, which later frames may enlarge."""
    if image.size == canvas:
        return image
    padded = Image.new("RGB", canvas, "white")
    padded.paste(image)
    return padded


def _resized(frame: Frames, size: tuple[int, int]) -> Frames:
    if (frame.shape[1], frame.shape[0]) == size:
        return frame
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
