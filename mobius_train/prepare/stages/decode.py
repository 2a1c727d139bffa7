"""A file's bytes become frames at a constant rate. What it is is told by its content, never by its name."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePath
from typing import Any, ClassVar, Literal

import av
import cv2
import numpy as np
from PIL import Image
from pydantic import Field

from mobius_train.data.headers import read_header
from mobius_train.prepare.candidate import Candidate, Dropped, Frames
from mobius_train.prepare.ceilings import Limits
from mobius_train.prepare.stages.stage import ClipStage
from mobius_train.prepare.timing import as_browsers, rate, shown

# The demuxer is named, never guessed: a playlist under the name of a video would open other files.
DEMUXERS = {"mov": (".mp4", ".m4v", ".mov"), "matroska": (".webm", ".mkv"), "avi": (".avi",)}
PICTURES = {"gif": (".gif",), "webp": (".webp",), "png": (".png", ".apng"), "still": (".png", ".jpg", ".jpeg")}
MAX_LOST = 0.1  # of a video's frames that may fail to decode


class Decode(ClipStage):
    """GIF, WebP, APNG and stills by Pillow, video by PyAV; transparent pixels become white.

    Times of frames are honoured: a frame is repeated or left out as its duration asks.
    """

    name: Literal["decode"]
    fps: float | None = Field(None, gt=0, le=60, description="none: the rate of most of the file's frames")
    max_side: int | None = Field(None, ge=8, description="longer sides are scaled down to it while decoding")
    more_frames_than: int = Field(4, ge=0, description="files of fewer are dropped before they are decoded")
    limits: Limits = Limits()
    needs_frames: ClassVar[bool] = False

    def process(self, clip: Candidate) -> None:
        self.limits.check_bytes(clip.size)
        data = clip.read()
        clip.sha256 = hashlib.sha256(data).hexdigest()
        kind = _sniff(data)
        endings = DEMUXERS.get(kind) or PICTURES[kind]
        suffix = PurePath(clip.origin.partition(" (")[0]).suffix.lower()
        if suffix not in endings:
            clip.notes.append(f"wrong extension: {kind} named {suffix}")
        frames, fps = self._video(data, kind) if kind in DEMUXERS else self._picture(clip, data)
        clip.frames, clip.fps = frames, fps
        clip.start, clip.end = 0.0, len(frames) / fps

    def _check_count(self, count: int) -> None:
        if count <= self.more_frames_than:
            raise Dropped("still" if count == 1 else "too few frames", f"{count}")

    def _picture(self, clip: Candidate, data: bytes) -> tuple[Frames, float]:
        try:
            header = read_header(data, self.limits.max_pixels)
        except ValueError as error:
            raise Dropped("damaged", error) from error
        self.limits.check(header.width, header.height, header.num_frames)
        self._check_count(header.num_frames)
        size = self._size(header.width, header.height)
        frames, durations, sizes = [], [], set()
        try:
            with (
                warnings.catch_warnings(),
                Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG", "JPEG")) as image,
            ):
                warnings.simplefilter("ignore")
                for number in range(getattr(image, "n_frames", 1)):
                    image.seek(number)
                    image.load()
                    sizes.add(image.size)
                    self.limits.check(*image.size, number + 1)
                    frames.append(_resized(on_white(image, (header.width, header.height)), size))
                    durations.append(float(image.info.get("duration") or 0))
        # What decoders raise on damaged data is not one family.
        except (OSError, EOFError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError) as error:
            raise Dropped("damaged", error) from error
        self._check_count(len(frames))
        if len(sizes) > 1:
            clip.notes.append("canvas changes")
        if len(frames) > 1 and not any(durations):
            clip.notes.append("zero duration")
        times = as_browsers(durations)
        fps = self.fps or rate(times)
        wanted = shown(times, fps)
        self.limits.check(*size, len(wanted))
        return np.stack([frames[number] for number in wanted]), fps

    def _video(self, data: bytes, demuxer: str) -> tuple[Frames, float]:
        try:
            starts = self._packet_times(data, demuxer)
            self._check_count(len(starts))
            durations = [1000 * (after - before) for before, after in pairwise(starts)]
            if len(starts) > 1 and not any(duration > 0 for duration in durations):
                raise Dropped("zero duration", "all frames at one time")
            positive = [duration for duration in durations if duration > 0] or [1000.0]
            durations.append(1000 / rate(positive))  # the last frame's end is written nowhere for certain
            fps = self.fps or rate(positive)
            return self._frames_at(data, demuxer, starts[0], sum(durations) / 1000, fps, len(starts)), fps
        except (av.error.FFmpegError, ValueError, OverflowError) as error:
            raise Dropped("damaged", error) from error

    def _packet_times(self, data: bytes, demuxer: str) -> list[float]:
        """Seconds at which frames begin, sorted, from the container alone."""
        with av.open(io.BytesIO(data), format=demuxer) as container:
            stream = _video_stream(container)
            self.limits.check(stream.codec_context.width, stream.codec_context.height, 1)
            times: list[float] = []
            step = 1 / float(stream.average_rate or 25)
            for packet in container.demux(stream):
                if packet.size:
                    times.append(len(times) * step if packet.pts is None else float(packet.pts * packet.time_base))
                    if len(times) > self.limits.max_frames:
                        raise Dropped("too many frames", f"more than {self.limits.max_frames}")
        return sorted(times)

    def _frames_at(self, data: bytes, demuxer: str, start: float, seconds: float, fps: float, packets: int) -> Frames:
        """The frame on display in the middle of each 1/fps seconds; only those are ever held."""
        count = max(1, round(seconds * fps))
        frames: list[Frames] = []
        current, decoded, size = None, 0, (0, 0)
        for frame in self._decoded(data, demuxer):
            time = start + decoded / fps if frame.time is None else frame.time
            if current is None:
                size = self._size(frame.width, frame.height)
                self.limits.check(*size, count)
            while current is not None and len(frames) < count and start + (len(frames) + 0.5) / fps < time:
                frames.append(_resized(current.to_ndarray(format="rgb24"), size))
            current, decoded = frame, decoded + 1
        if current is None:
            raise Dropped("no picture", "no frame decodes")
        if decoded < (1 - MAX_LOST) * packets:
            raise Dropped("damaged", f"{decoded} of {packets} frames decode")
        last = _resized(current.to_ndarray(format="rgb24"), size)
        return np.stack([*frames, *[last] * (count - len(frames))])

    def _decoded(self, data: bytes, demuxer: str) -> Iterator[Any]:
        with av.open(io.BytesIO(data), format=demuxer) as container:
            stream = _video_stream(container)
            for frame in container.decode(stream):
                self.limits.check(frame.width, frame.height, 1)
                yield frame

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) as kept."""
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
        return "still"
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    raise Dropped("unknown kind", f"it begins with {data[:8]!r}")


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise Dropped("no picture", f"{len(container.streams)} other streams")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise Dropped("no picture", "its codec is not known")
    stream.codec_context.thread_count = 1  # parts are what runs side by side
    return stream


def on_white(image: Image.Image, canvas: tuple[int, int]) -> Frames:
    """8-bit RGB (H, W, 3) of this (width, height); 16-bit greys keep their upper byte."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        grey = (values / 257 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    if image.size != canvas:
        padded = Image.new("RGB", canvas, "white")
        padded.paste(image.convert("RGB"))
        image = padded
    return np.asarray(image.convert("RGB"))


def _resized(frame: Frames, size: tuple[int, int]) -> Frames:
    if (frame.shape[1], frame.shape[0]) == size:
        return frame
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
