"""Size, frames and orientation of a picture, from its headers without decoding.

A few hundred bytes can declare gigabytes of pixels, and image libraries allocate before they check. The parsers here
take time linear in the file size, and stop once a limit is exceeded.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from mobius_train.data.animation_blocks import gif_blocks, png_chunks
from mobius_train.data.kinds import kind_of
from mobius_train.data.limits import Limits, Undecodable
from mobius_train.data.orientation import UPRIGHT, Turn, turn_of_exif


class Header(NamedTuple):
    """width, height: of the stored frames, which are shown after `turn`.

    durations: in ms, of all frames; those counted before a limit was exceeded, if there are more. still_first: the file
    begins with a picture that is not part of the animation. outside: a frame extends beyond the declared canvas, and
    enlarges it. transfer, primaries: numbers of ITU-T H.273, 2 if unknown. gamma: exponent of a PNG whose colours are
    described by it alone.
    """

    kind: str
    width: int
    height: int
    durations: tuple[float, ...] = (0.0,)
    turn: Turn = UPRIGHT
    still_first: bool = False
    outside: bool = False
    transfer: int = 2
    primaries: int = 2
    gamma: float | None = None

    @property
    def num_frames(self) -> int:
        return len(self.durations)


def read_header(data: bytes, limits: Limits) -> Header:
    """The header of a GIF, WebP, PNG (possibly animated) or JPEG, detected by content.

    Args:
        limits: counting stops once they are exceeded.

    Raises:
        Undecodable: the file is of an unknown kind, or the picture exceeds the limits.
        ValueError: the file is a video, or damaged.
    """
    try:
        match kind_of(data):
            case "gif":
                header = _gif(data, limits)
            case "webp":
                header = _webp(data, limits)
            case "png":
                header = _png(data, limits)
            case _:
                header = _jpeg(data)
    except (IndexError, struct.error) as error:
        raise ValueError("the file ends too early") from error
    limits.check(header.width, header.height, header.num_frames)
    return header


def _within(width: int, height: int, frames: int, limits: Limits) -> bool:
    return frames <= limits.max_frames and frames * width * height <= limits.max_pixels


def _jpeg(data: bytes) -> Header:
    try:
        # Pillow opens lazily: the size is known before any pixel is decoded.
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return Header("jpeg", *image.size, turn=turn_of_exif(image.info.get("exif", b"")))
    except Image.DecompressionBombError as error:
        raise Undecodable("too large", error) from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError("not a GIF, WebP, PNG or JPEG") from error


def _gif(data: bytes, limits: Limits) -> Header:
    screen = width, height = struct.unpack_from("<HH", data, 6)
    durations: list[float] = []
    for frame in gif_blocks(data):
        width, height = max(width, frame.left + frame.width), max(height, frame.top + frame.height)
        durations.append(frame.duration)
        if not _within(width, height, len(durations), limits):
            break
    if not durations:
        raise ValueError("a GIF without a frame")
    return Header("gif", width, height, tuple(durations), outside=(width, height) != screen)


def _webp(data: bytes, limits: Limits) -> Header:
    """https://developers.google.com/speed/webp/docs/riff_container"""
    width = height = 0
    durations: list[float] = []
    turn = UPRIGHT
    position = 12
    while position < len(data) and _within(width, height, len(durations), limits):
        name, size = struct.unpack_from("<4sI", data, position)
        body = position + 8
        if body + size > len(data):
            raise ValueError("the file ends too early")
        if name == b"VP8X":
            width, height = _uint24(data, body + 4) + 1, _uint24(data, body + 7) + 1
        elif name == b"ANMF":
            durations.append(_uint24(data, body + 12))
        elif name == b"VP8 " and not width:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, body + 6))
        elif name == b"VP8L" and not width:
            bits = struct.unpack_from("<I", data, body + 1)[0]
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif name == b"EXIF":
            turn = turn_of_exif(data[body : body + size])
        position = body + size + size % 2
    if not width or not height:
        raise ValueError("a WebP without a picture")
    return Header("webp", width, height, tuple(durations) or (0.0,), turn)


def _uint24(data: bytes, position: int) -> int:
    return struct.unpack_from("<HB", data, position)[0] | data[position + 2] << 16


def _png(data: bytes, limits: Limits) -> Header:
    """https://www.w3.org/TR/png-3"""
    width, height = struct.unpack_from(">II", data, 16)
    announced = 0
    durations: list[float] = []
    turn, transfer, primaries, still_first = UPRIGHT, 2, 2, False
    gamma, described = None, False
    for name, start, end in png_chunks(data):
        if name == b"acTL":
            announced = struct.unpack_from(">I", data, start)[0]
        elif name == b"fcTL":
            delay, unit = struct.unpack_from(">HH", data, start + 20)
            durations.append(1000 * delay / (unit or 100))
            if not _within(width, height, len(durations), limits):
                break
        elif name == b"IDAT" and announced and not durations:
            still_first = True
        elif name == b"eXIf":
            turn = turn_of_exif(data[start:end])
        elif name == b"cICP":
            primaries, transfer, described = data[start], data[start + 1], True
        elif name in (b"sRGB", b"iCCP"):
            described = True
        elif name == b"gAMA" and (value := struct.unpack_from(">I", data, start)[0]):
            gamma = 1e5 / value
        elif name == b"IEND" and announced and len(durations) != announced:
            raise ValueError(f"an animation of {announced} frames has {len(durations)}")
    times = tuple(durations) if announced else (0.0,)
    gamma = None if described else gamma
    return Header("png", width, height, times, turn, still_first, False, transfer, primaries, gamma)
