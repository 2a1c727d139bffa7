"""Decoding of files to frames as viewers show them: the only decoder, for training, preparation and evaluation.

The cost of a file is bounded before its pixels are decoded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple, TypeVar

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mobius_train.data.buckets import Shape
from mobius_train.data.headers import read_header
from mobius_train.data.kinds import CLIP_SUFFIXES, VIDEO_ENDINGS, VIDEO_SUFFIXES, kind_of
from mobius_train.data.limits import Limits, Undecodable
from mobius_train.data.pictures import picture_frames, picture_notes
from mobius_train.data.rank_zero import warn_on_rank_zero
from mobius_train.data.timing import as_browsers
from mobius_train.data.videos import open_video, video_durations, video_frames, video_size
from mobius_train.data.windows import START, WHOLE, FrameChoice
from mobius_train.errors import MobiusError

# Changes whenever a file is shown differently, so that latents cached before are not used.
DECODER = "2"
# Limits of training clips.
PICTURE_LIMITS = Limits(max_file_bytes=2**26, max_frames=2**16)
VIDEO_LIMITS = Limits(max_file_bytes=2**28)

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

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Oddities of training clips that this process has named.
_noted: set[str] = set()


class Timeline(NamedTuple):
    """durations: of all frames, in ms. width, height: declared size of a frame, which is not yet turned."""

    durations: list[float]
    width: int
    height: int


def decode_frames(
    data: bytes,
    limits: Limits,
    choose: Callable[[Timeline], list[int]],
    finish: Callable[[Image.Image], T],
) -> tuple[list[T], list[str]]:
    """Decode the chosen frames of a file.

    Args:
        choose: returns frame numbers in ascending order, possibly repeated; may raise to refuse the file undecoded.
        finish: what to keep of a frame, an RGB image as viewers show it.

    Returns:
        The finished frames, and notes on what is odd about the file and how it is shown.

    Raises:
        Undecodable: the file is of another kind, exceeds the limits or yields no frames.
        DAMAGED: the file is damaged.
    """
    kind = kind_of(data)
    if kind in VIDEO_ENDINGS:
        with open_video(data, kind, limits) as (_, stream):
            size = stream.codec_context.width, stream.codec_context.height
        return video_frames(data, kind, limits, lambda durations: choose(Timeline(durations, *size)), finish)
    header = read_header(data, limits)
    numbers = choose(Timeline(as_browsers(list(header.durations)), header.width, header.height))
    return [finish(image) for image in picture_frames(data, numbers, header)], picture_notes(header)


def limits_of(suffix: str) -> Limits:
    """The limits of training clips with this suffix."""
    return VIDEO_LIMITS if suffix in VIDEO_SUFFIXES else PICTURE_LIMITS


def check_bytes(size: int, suffix: str, name: str) -> None:
    """Reject a file that is too large to read.

    Raises:
        MobiusError: names the file, its size and the limit.
    """
    with _named(name):
        limits_of(suffix).check_bytes(size)


def decode_clip(
    data: bytes,
    suffix: str,
    name: str,
    *,
    num_frames: int,
    resolution: int | tuple[int, int],
    choice: FrameChoice = WHOLE,
    place: Fraction = START,
) -> Tensor:
    """Decode frames of a clip, centre-cropped to the requested aspect ratio.

    Args:
        resolution: pixels: the side of a square, or (width, height).
        choice: which frames; default: evenly spaced over the clip's length.
        place: of the window; see `window_start`.

    Returns:
        (F, 3, height, width) uint8. Frames that already have this size are not resampled. A warning names the first
        clip of each oddity, such as interlaced video.

    Raises:
        MobiusError: the clip has too few frames, is too large, damaged, or of an unknown kind; names the clip.
    """
    _check(data, suffix, name)
    limits = limits_of(suffix)
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    repeated: list[str] = []

    def choose(timeline: Timeline) -> list[int]:
        available = choice.available(len(choice.ticks(timeline.durations)))
        if available < num_frames:
            if choice.window != "whole":
                raise choice.too_short(name, available, num_frames)
            raise MobiusError(_too_few(available, num_frames, name))
        if num_frames > 1:
            limits.check(timeline.width, timeline.height, len(timeline.durations))
        numbers = choice.frames(timeline.durations, num_frames, place)
        if choice.rate is not None and len(set(numbers)) < num_frames:
            repeated[:] = [f"it has fewer frames per second than data.frame_rate={choice.rate:g}: frames are repeated"]
        return numbers

    with _named(name):
        frames, notes = decode_frames(data, limits, choose, lambda image: np.asarray(crop_to_size(image, size)))
    for note in [*notes, *repeated]:
        if note not in _noted:
            _noted.add(note)
            warn_on_rank_zero(logger, f"{name}: {note}. Other clips with this property are not named")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def frame_durations(data: bytes, suffix: str, name: str) -> list[float]:
    """Durations of all frames in ms, without decoding.

    Raises:
        MobiusError: the clip is too large, damaged, or of an unknown kind; names the clip.
    """
    limits = limits_of(suffix)
    with _named(name):
        kind = kind_of(data)
        if kind in VIDEO_ENDINGS:
            return video_durations(data, kind, limits)
        return as_browsers(list(read_header(data, limits).durations))


def _too_few(available: int, num_frames: int, name: str) -> str:
    kind = "is a still" if available == 1 else f"has {available} frames"
    return (
        f"{name} {kind}, but {num_frames} frames are required: remove it, or set num_frames={max(available, 1)} or less"
    )


def shape_of(data: bytes, suffix: str, name: str, choice: FrameChoice = WHOLE) -> Shape:
    """Frames to take, width and height of a clip as shown, from its headers and the first frame of a video.

    Args:
        choice: how frames are taken; default: all frames of the file.

    Raises:
        MobiusError: the clip is too large, damaged, or of an unknown kind; names the clip.
    """
    _check(data, suffix, name)
    limits = limits_of(suffix)
    with _named(name):
        kind = kind_of(data)
        if kind in VIDEO_ENDINGS:
            durations, size = video_durations(data, kind, limits), video_size(data, kind, limits)
        else:
            header = read_header(data, limits)
            durations, size = as_browsers(list(header.durations)), header.turn.size(header.width, header.height)
        return Shape(choice.available(len(choice.ticks(durations))), *size)


def _check(data: bytes, suffix: str, name: str) -> None:
    check_bytes(len(data), suffix, name)
    if suffix not in CLIP_SUFFIXES:
        raise MobiusError(f"{name} is not a clip: supported are {', '.join(CLIP_SUFFIXES)}")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn decoder errors into a MobiusError that names the clip."""
    try:
        yield
    except Undecodable as error:
        raise MobiusError(f"{name} yields no frames, {error}. Shorten, repair or remove it") from error
    except DAMAGED as error:
        raise MobiusError(f"{name} is damaged or of another kind: {error}. Fetch it again or remove it") from error


def crop_to_size(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Centre-crop to the aspect ratio of `size` (width, height) and resize."""
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (min(side, max(1, round(to / scale))) for side, to in zip(image.size, size, strict=True))
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
