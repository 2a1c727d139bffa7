"""From a file's bytes to frames: GIF, WebP and stills by Pillow, video by PyAV.

What a file may cost is bounded before its pixels are decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mobius_train.data.buckets import Shape
from mobius_train.data.headers import Header, read_header
from mobius_train.errors import MobiusError

PICTURES = (".gif", ".webp", ".png", ".jpg", ".jpeg")
# The demuxer is named, never guessed: a playlist under the name of a video would open other files.
VIDEOS = {".mp4": "mov", ".mov": "mov", ".webm": "matroska"}
SUFFIXES = (*PICTURES, *VIDEOS)

MAX_PICTURE_BYTES = 2**26
MAX_VIDEO_BYTES = 2**28
MAX_FRAME_PIXELS = 2**24  # 4096 x 4096
MAX_CLIP_PIXELS = 2**30  # of all the file's frames: 517 of 1920 x 1080


def check_bytes(size: int, suffix: str, name: str) -> None:
    """Refuse a file that is too large to be read.

    Raises:
        MobiusError: naming the file, its size and the limit.
    """
    limit = MAX_VIDEO_BYTES if suffix in VIDEOS else MAX_PICTURE_BYTES
    if size > limit:
        raise MobiusError(f"{name} has {size} bytes, more than the limit of {limit}: cut it or make it smaller")


def decode(data: bytes, suffix: str, name: str, *, num_frames: int, resolution: int | tuple[int, int]) -> Tensor:
    """Frames floor(i·n/F) of the n in the file, on white, cropped in the middle to the wanted aspect ratio.

    Args:
        resolution: pixels, of a square, or width and height.

    Returns:
        (F, 3, height, width) uint8. Frames of that size already are left as they are.

    Raises:
        MobiusError: naming the clip: fewer frames than asked, too large, damaged, or of no known kind.
    """
    check_bytes(len(data), suffix, name)
    if suffix in VIDEOS:
        images = _video(data, VIDEOS[suffix], name, num_frames)
    elif suffix in PICTURES:
        images = _pictures(data, name, num_frames)
    else:
        raise MobiusError(f"{name} is no clip: known are {', '.join(SUFFIXES)}")
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    frames = [np.asarray(_fit(image, size)) for image in images]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def shape_of(data: bytes, suffix: str, name: str) -> Shape:
    """Frames, width and height of a clip as its headers say, and the packets of a video; no pixel is decoded.

    Raises:
        MobiusError: naming the clip: too large, damaged, or of no known kind.
    """
    check_bytes(len(data), suffix, name)
    if suffix in PICTURES:
        header = _header(data, name)
        return Shape(header.num_frames, header.width, header.height)
    if suffix not in VIDEOS:
        raise MobiusError(f"{name} is no clip: known are {', '.join(SUFFIXES)}")
    try:
        with _stream(data, VIDEOS[suffix], name) as (container, stream):
            width, height = stream.codec_context.width, stream.codec_context.height
            frames = sum(packet.size > 0 for packet in container.demux(stream))
    except (av.error.FFmpegError, ValueError) as error:
        raise MobiusError(f"{name} is damaged or no video of its kind: {error}") from error
    if not min(frames, width, height):
        raise MobiusError(f"{name} has no video frame")
    return Shape(frames, width, height)


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """On white, its middle of the aspect ratio of `size`, at this size."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    image = image.convert("RGB")
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (min(side, max(1, round(to / scale))) for side, to in zip(image.size, size, strict=True))
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _wanted(available: int, num_frames: int, name: str) -> list[int]:
    if available < num_frames:
        kind = "is a still" if available == 1 else f"has {available} frames"
        raise MobiusError(
            f"{name} {kind} but {num_frames} frames are asked for: leave it out, or ask for"
            f" num_frames={max(available, 1)} or fewer"
        )
    return [number * available // num_frames for number in range(num_frames)]


def _check_pixels(width: int, height: int, frames: int, name: str) -> None:
    pixels = width * height
    if pixels > MAX_FRAME_PIXELS:
        raise MobiusError(
            f"{name} has frames of {width}x{height}, {pixels} pixels: more than"
            f" the limit of {MAX_FRAME_PIXELS}; make it smaller"
        )
    if pixels * frames > MAX_CLIP_PIXELS:
        raise MobiusError(
            f"{name} has {frames} or more frames of {width}x{height}, {pixels * frames} pixels in all: more"
            f" than the limit of {MAX_CLIP_PIXELS}; cut it or make it smaller"
        )


def _header(data: bytes, name: str) -> Header:
    try:
        header = read_header(data, MAX_CLIP_PIXELS)
    except ValueError as error:
        raise MobiusError(f"{name} cannot be read: {error}") from error
    _check_pixels(header.width, header.height, header.num_frames, name)
    return header


def _pictures(data: bytes, name: str, num_frames: int) -> list[Image.Image]:
    header = _header(data, name)
    wanted = _wanted(header.num_frames, num_frames, name)
    images = []
    try:
        with Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG", "JPEG")) as image:
            for number in wanted:
                image.seek(number)
                images.append(image.copy())
    # What decoders raise on damaged data is not one family.
    except (OSError, EOFError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError) as error:
        raise MobiusError(f"{name} is damaged: {error}") from error
    return images


def _video(data: bytes, demuxer: str, name: str, num_frames: int) -> list[Image.Image]:
    """The number of frames is that of the frames decoded: headers and packets only guess it."""
    try:
        if num_frames == 1:
            first = next(_video_frames(data, demuxer, name), None)
            if first is None:
                raise MobiusError(f"{name} has no video frame")
            return [first.to_image()]
        available = _count_packets(data, demuxer, name)
        while True:
            wanted = set(_wanted(available, num_frames, name))
            images, decoded = [], 0
            for decoded, frame in enumerate(_video_frames(data, demuxer, name), start=1):
                if decoded - 1 in wanted:
                    images.append(frame.to_image())
            if decoded == available:
                return images
            available = decoded
    except (av.error.FFmpegError, ValueError) as error:
        raise MobiusError(f"{name} is damaged or no video of its kind: {error}") from error


@contextmanager
def _stream(data: bytes, demuxer: str, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, whose announced size is within the limit."""
    with av.open(io.BytesIO(data), format=demuxer) as container:
        if not container.streams.video:
            raise MobiusError(f"{name} has no picture, only {len(container.streams)} other streams")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the loader has its own workers
        _check_pixels(stream.codec_context.width, stream.codec_context.height, 1, name)
        yield container, stream


def _count_packets(data: bytes, demuxer: str, name: str) -> int:
    with _stream(data, demuxer, name) as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


def _video_frames(data: bytes, demuxer: str, name: str) -> Iterator[av.VideoFrame]:
    with _stream(data, demuxer, name) as (container, stream):
        for number, frame in enumerate(container.decode(stream), start=1):
            _check_pixels(frame.width, frame.height, number, name)
            yield frame
