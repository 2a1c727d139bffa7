"""From a file's bytes to frames: GIF, WebP and stills by Pillow, video by PyAV; for training and for preparation.

What a file may cost is bounded before its pixels are decoded. `decode` and `shape_of` are what training reads clips
by; the functions below them read any file frame by frame.
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
from torch import Tensor

from mobius_train.data.buckets import Shape
from mobius_train.data.ceilings import Limits, Undecodable
from mobius_train.data.headers import Header, read_header
from mobius_train.errors import MobiusError

PICTURES = (".gif", ".webp", ".png", ".jpg", ".jpeg")
# The demuxer is named, never guessed: a playlist under the name of a video would open other files.
VIDEOS = {".mp4": "mov", ".mov": "mov", ".webm": "matroska"}
SUFFIXES = (*PICTURES, *VIDEOS)

# Of the clips that training reads; their frames are bounded by their pixels alone.
PICTURE_LIMITS = Limits(max_file_bytes=2**26, max_frames=2**30)
VIDEO_LIMITS = Limits(max_file_bytes=2**28, max_frames=2**30)

# What decoders raise on damaged data is not one family.
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
    """Refuse a file that is too large to be read.

    Raises:
        MobiusError: naming the file, its size and the limit.
    """
    with _named(name):
        _limits(suffix).check_bytes(size)


def decode(data: bytes, suffix: str, name: str, *, num_frames: int, resolution: int | tuple[int, int]) -> Tensor:
    """Frames floor(i·n/F) of the n in the file, on white, cropped in the middle to the wanted aspect ratio.

    Args:
        resolution: pixels, of a square, or width and height.

    Returns:
        (F, 3, height, width) uint8. Frames of that size already are left as they are.

    Raises:
        MobiusError: naming the clip: fewer frames than asked, too large, damaged, or of no known kind.
    """
    _check(data, suffix, name)
    with _named(name):
        images = (_frames_of_video if suffix in VIDEOS else _frames_of_picture)(data, suffix, name, num_frames)
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    frames = [np.asarray(cover(image, size)) for image in images]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def shape_of(data: bytes, suffix: str, name: str) -> Shape:
    """Frames, width and height of a clip as its headers say, and the packets of a video; no pixel is decoded.

    Raises:
        MobiusError: naming the clip: too large, damaged, or of no known kind.
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
        raise MobiusError(f"{name} is no clip: known are {', '.join(SUFFIXES)}")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of decoders as one that names the clip."""
    try:
        yield
    except Undecodable as error:
        raise MobiusError(f"{name} gives no frames, {error}. Cut it, repair it or leave it out") from error
    except DAMAGED as error:
        raise MobiusError(f"{name} is damaged or of another kind: {error}. Fetch it again or leave it out") from error


def _wanted(available: int, num_frames: int, name: str) -> list[int]:
    if available < num_frames:
        kind = "is a still" if available == 1 else f"has {available} frames"
        raise MobiusError(
            f"{name} {kind} but {num_frames} frames are asked for: leave it out, or ask for"
            f" num_frames={max(available, 1)} or fewer"
        )
    return [number * available // num_frames for number in range(num_frames)]


def _frames_of_picture(data: bytes, suffix: str, name: str, num_frames: int) -> list[Image.Image]:
    limits = _limits(suffix)
    wanted = _wanted(picture_header(data, limits).num_frames, num_frames, name)
    return [image for image, _ in picture_frames(data, wanted, limits)]


def _frames_of_video(data: bytes, suffix: str, name: str, num_frames: int) -> list[Image.Image]:
    """The number of frames is that of the frames decoded: headers and packets only guess it."""
    demuxer, limits = VIDEOS[suffix], _limits(suffix)
    if num_frames == 1:
        first = next(video_frames(data, demuxer, limits), None)
        if first is None:
            raise Undecodable("no picture", "no frame decodes")
        return [first.to_image()]
    available = len(packet_times(data, demuxer, limits))
    while True:
        wanted = set(_wanted(available, num_frames, name))
        images, decoded = [], 0
        for decoded, frame in enumerate(video_frames(data, demuxer, limits), start=1):
            limits.check(frame.width, frame.height, decoded)
            if decoded - 1 in wanted:
                images.append(frame.to_image())
        if decoded == available:
            return images
        available = decoded


def picture_header(data: bytes, limits: Limits) -> Header:
    """Kind, size and frames of a picture, within the limits.

    Raises:
        Undecodable: they are not.
        ValueError: the bytes are no picture, or damaged.
    """
    header = read_header(data, limits.max_pixels)
    limits.check(header.width, header.height, header.num_frames)
    return header


def picture_frames(data: bytes, numbers: Iterable[int], limits: Limits) -> Iterator[tuple[Image.Image, float]]:
    """Frames of a picture by their numbers, RGB on white, with their durations in ms; 0 where the file says none.

    Call `picture_header` before: it bounds what Pillow allocates.

    Raises:
        Undecodable: a frame is larger than the header says, and than the limits.
        DAMAGED: the data are.
    """
    with Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG", "JPEG")) as image:
        for number in numbers:
            image.seek(number)
            image.load()
            limits.check(*image.size, number + 1)
            yield on_white(image), float(image.info.get("duration") or 0)


@contextmanager
def video_stream(data: bytes, demuxer: str, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, whose announced size is within the limits.

    Raises:
        Undecodable: the limits are passed, or there is no stream that can be decoded.
        DAMAGED: the data are.
    """
    with av.open(io.BytesIO(data), format=demuxer) as container:
        if not container.streams.video:
            raise Undecodable("no picture", f"{len(container.streams)} other streams")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise Undecodable("no picture", "its codec is not known")
        stream.codec_context.thread_count = 1  # several files are decoded at once, each in a process
        limits.check(stream.codec_context.width, stream.codec_context.height, 1)
        yield container, stream


def packet_times(data: bytes, demuxer: str, limits: Limits) -> list[float]:
    """Seconds at which a video's frames begin, sorted, from the container alone; raises as `video_stream`."""
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
    """All frames of a video, each within the limits of one frame; raises as `video_stream`."""
    with video_stream(data, demuxer, limits) as (container, stream):
        for frame in container.decode(stream):
            limits.check(frame.width, frame.height, 1)
            yield frame


def on_white(image: Image.Image) -> Image.Image:
    """8-bit RGB of the same size; 16-bit greys keep their upper byte."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        grey = (values / 257 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    # A copy: the frames of an animation are drawn into one picture.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image's middle of the aspect ratio of `size` (width, height), at this size."""
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (min(side, max(1, round(to / scale))) for side, to in zip(image.size, size, strict=True))
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
