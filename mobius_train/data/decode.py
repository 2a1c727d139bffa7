"""Decoding of files to frames: GIF, WebP and stills with Pillow, video with PyAV.

The cost of a file is bounded before its pixels are decoded. Training uses `decode_clip` and `shape_of`. Preparation
uses the functions below them, which read a file frame by frame.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mobius_train.config import Section
from mobius_train.data.buckets import Shape
from mobius_train.data.headers import Header, read_header
from mobius_train.errors import MobiusError


class Undecodable(Exception):
    """A file that yields no frames. reason: a short text shared by many files. detail: this file's numbers."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, str(detail)


class Limits(Section):
    """Checked against the headers before decoding, and again against the decoded frames."""

    max_file_bytes: int = Field(2**30, ge=1)
    max_frame_pixels: int = Field(2**24, ge=1, description="width x height: 4096 x 4096")
    max_frames: int = Field(2**18, ge=1, description="frames in the file")
    max_pixels: int = Field(2**30, ge=1, description="in all frames of an animation, or all kept frames of a video")

    def check_bytes(self, size: int) -> None:
        """
        Raises:
            Undecodable: the file is too large.
        """
        if size > self.max_file_bytes:
            raise Undecodable("too large", f"{size} bytes; the limit is {self.max_file_bytes}")

    def check(self, width: int, height: int, frames: int) -> None:
        """
        Raises:
            Undecodable: a frame, the number of frames, or their total number of pixels is too large.
        """
        pixels = width * height
        if pixels > self.max_frame_pixels:
            limit = self.max_frame_pixels
            raise Undecodable("too large", f"frames of {width}x{height}, {pixels} pixels; the limit is {limit}")
        if frames > self.max_frames:
            raise Undecodable("too many frames", f"{frames} or more; the limit is {self.max_frames}")
        if pixels * frames > self.max_pixels:
            counted = f"{frames} or more frames of {width}x{height}, {pixels * frames} pixels"
            raise Undecodable("too large", f"{counted}; the limit is {self.max_pixels}")


PICTURES = (".gif", ".webp", ".png", ".jpg", ".jpeg")
# The demuxer is fixed by the suffix: with guessing, a playlist named like a video could open other files.
VIDEOS = {".mp4": "mov", ".mov": "mov", ".webm": "matroska"}
SUFFIXES = (*PICTURES, *VIDEOS)

# Limits of training clips. Only the pixels bound the number of frames.
PICTURE_LIMITS = Limits(max_file_bytes=2**26, max_frames=2**30)
VIDEO_LIMITS = Limits(max_file_bytes=2**28, max_frames=2**30)

# Decoders have no common exception class for damaged data.
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    IndexError,
    OverflowError,
    Image.DecompressionBombError,
    av.error.FFmpegError,
)


def check_bytes(size: int, suffix: str, name: str) -> None:
    """Reject a file that is too large to read.

    Raises:
        MobiusError: names the file, its size and the limit.
    """
    with _named(name):
        _limits(suffix).check_bytes(size)


def decode_clip(data: bytes, suffix: str, name: str, *, num_frames: int, resolution: int | tuple[int, int]) -> Tensor:
    """Decode frames floor(i·n/F) of the file's n frames, on white, centre-cropped to the requested aspect ratio.

    Args:
        resolution: pixels: the side of a square, or (width, height).

    Returns:
        (F, 3, height, width) uint8. Frames that already have this size are not resampled.

    Raises:
        MobiusError: the clip has too few frames, is too large, damaged, or of an unknown kind; names the clip.
    """
    _check(data, suffix, name)
    with _named(name):
        images = (_frames_of_video if suffix in VIDEOS else _frames_of_picture)(data, suffix, name, num_frames)
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    frames = [np.asarray(crop_to_size(image, size)) for image in images]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def shape_of(data: bytes, suffix: str, name: str) -> Shape:
    """Frames, width and height of a clip, from its headers (and the packets of a video) without decoding.

    Raises:
        MobiusError: the clip is too large, damaged, or of an unknown kind; names the clip.
    """
    _check(data, suffix, name)
    limits = _limits(suffix)
    with _named(name):
        if suffix in PICTURES:
            header = picture_header(data, limits)
            return Shape(header.num_frames, header.width, header.height)
        with video_stream(data, VIDEOS[suffix], limits) as (_, stream):
            width, height = stream.codec_context.width, stream.codec_context.height
        shape = Shape(len(packet_times(data, VIDEOS[suffix], limits)), width, height)
        if not min(shape):
            raise Undecodable("no picture", "it has no video frame")
    return shape


def _limits(suffix: str) -> Limits:
    return VIDEO_LIMITS if suffix in VIDEOS else PICTURE_LIMITS


def _check(data: bytes, suffix: str, name: str) -> None:
    check_bytes(len(data), suffix, name)
    if suffix not in SUFFIXES:
        raise MobiusError(f"{name} is not a clip: supported are {', '.join(SUFFIXES)}")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn decoder errors into a MobiusError that names the clip."""
    try:
        yield
    except Undecodable as error:
        raise MobiusError(f"{name} yields no frames, {error}. Shorten, repair or remove it") from error
    except DAMAGED as error:
        raise MobiusError(f"{name} is damaged or of another kind: {error}. Fetch it again or remove it") from error


def _frame_numbers(available: int, num_frames: int, name: str) -> list[int]:
    if available < num_frames:
        kind = "is a still" if available == 1 else f"has {available} frames"
        raise MobiusError(
            f"{name} {kind}, but {num_frames} frames are required: remove it, or set num_frames={max(available, 1)} or"
            " less"
        )
    return [number * available // num_frames for number in range(num_frames)]


def _frames_of_picture(data: bytes, suffix: str, name: str, num_frames: int) -> list[Image.Image]:
    limits = _limits(suffix)
    numbers = _frame_numbers(picture_header(data, limits).num_frames, num_frames, name)
    return [image for image, _ in picture_frames(data, numbers, limits)]


def _frames_of_video(data: bytes, suffix: str, name: str, num_frames: int) -> list[Image.Image]:
    """Decode until the frame count is consistent: headers and packets only estimate it."""
    demuxer, limits = VIDEOS[suffix], _limits(suffix)
    if num_frames == 1:
        first = next(video_frames(data, demuxer, limits), None)
        if first is None:
            raise Undecodable("no picture", "no frame can be decoded")
        return [first.to_image()]
    available = len(packet_times(data, demuxer, limits))
    while True:
        numbers = set(_frame_numbers(available, num_frames, name))
        images, decoded = [], 0
        for decoded, frame in enumerate(video_frames(data, demuxer, limits), start=1):
            limits.check(frame.width, frame.height, decoded)
            if decoded - 1 in numbers:
                images.append(frame.to_image())
        if decoded == available:
            return images
        available = decoded


def picture_header(data: bytes, limits: Limits) -> Header:
    """Kind, size and number of frames of a picture.

    Raises:
        Undecodable: the picture exceeds the limits.
        ValueError: the bytes are not a picture, or damaged.
    """
    header = read_header(data, limits.max_pixels)
    limits.check(header.width, header.height, header.num_frames)
    return header


def picture_frames(data: bytes, numbers: Iterable[int], limits: Limits) -> Iterator[tuple[Image.Image, float]]:
    """Yield the given frames of a picture as RGB on white, with durations in ms (0 if the file has none).

    Call `picture_header` first: it bounds the memory that Pillow allocates.

    Raises:
        Undecodable: a frame exceeds its header and the limits.
        DAMAGED: the data are damaged.
    """
    with Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG", "JPEG")) as image:
        for number in numbers:
            image.seek(number)
            image.load()
            limits.check(*image.size, number + 1)
            yield on_white(image), float(image.info.get("duration") or 0)


@contextmanager
def video_stream(data: bytes, demuxer: str, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """Open the container and its first video stream.

    Raises:
        Undecodable: the declared size exceeds the limits, or no stream can be decoded.
        DAMAGED: the data are damaged.
    """
    with av.open(io.BytesIO(data), format=demuxer) as container:
        if not container.streams.video:
            raise Undecodable("no picture", f"{len(container.streams)} other streams")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise Undecodable("no picture", "unknown codec")
        stream.codec_context.thread_count = 1  # parallelism comes from processes, one file each
        limits.check(stream.codec_context.width, stream.codec_context.height, 1)
        yield container, stream


def packet_times(data: bytes, demuxer: str, limits: Limits) -> list[float]:
    """Sorted start times of a video's frames in seconds, from the container only; raises as `video_stream`."""
    with video_stream(data, demuxer, limits) as (container, stream):
        times: list[float] = []
        step = 1 / float(stream.average_rate or 25)
        for packet in container.demux(stream):
            if packet.size:
                times.append(len(times) * step if packet.pts is None else float(packet.pts * packet.time_base))
                if len(times) > limits.max_frames:
                    raise Undecodable("too many frames", f"more than {limits.max_frames}")
    return sorted(times)


def video_frames(data: bytes, demuxer: str, limits: Limits) -> Iterator[av.VideoFrame]:
    """Yield all frames of a video, each checked against the frame limits; raises as `video_stream`."""
    with video_stream(data, demuxer, limits) as (container, stream):
        for frame in container.decode(stream):
            limits.check(frame.width, frame.height, 1)
            yield frame


def on_white(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB on white; 16-bit greys keep their upper byte."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        grey = (values / 257 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    # A copy, since Pillow reuses one image for all frames of an animation.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def crop_to_size(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Centre-crop to the aspect ratio of `size` (width, height) and resize."""
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (min(side, max(1, round(to / scale))) for side, to in zip(image.size, size, strict=True))
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
