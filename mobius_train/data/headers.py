"""Size and number of frames of a picture, from its headers without decoding.

A few hundred bytes can declare gigabytes of pixels, and image libraries allocate before they check. The parsers here
take time linear in the file size, and stop once `max_pixels` is exceeded.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError


class Header(NamedTuple):
    """num_frames: the frames counted before `max_pixels` was exceeded, or all. duration: ms of these frames."""

    kind: str
    width: int
    height: int
    num_frames: int = 1
    duration: int = 0


def read_header(data: bytes, max_pixels: int) -> Header:
    """The header of a GIF, WebP, PNG (possibly animated) or JPEG, detected by content.

    Args:
        max_pixels: total over all frames; counting stops once it is exceeded.

    Raises:
        ValueError: the bytes are of another format, or damaged.
    """
    try:
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return _gif(data, max_pixels)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data, max_pixels)
    except (IndexError, struct.error) as error:
        raise ValueError("the file ends too early") from error
    try:
        # Pillow opens both formats lazily: the size is known before any pixel is decoded.
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            return Header("still", *image.size, getattr(image, "n_frames", 1) if image.format == "PNG" else 1)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError("not a GIF, WebP, PNG or JPEG") from error


def _gif(data: bytes, max_pixels: int) -> Header:
    """https://www.w3.org/Graphics/GIF/spec-gif89a.txt; skips stray bytes, as Pillow does."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _colour_table(flags)
    frames = duration = 0
    while position < len(data) and data[position] != 0x3B and frames * width * height <= max_pixels:
        if data[position] == 0x21:  # an extension
            if data[position + 1] == 0xF9:  # the graphic control of the next frame
                duration += 10 * struct.unpack_from("<H", data, position + 4)[0]
            position = _past_sub_blocks(data, position + 2)
        elif data[position] == 0x2C:  # a frame; one that extends beyond the canvas enlarges it
            left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, position + 1)
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            end = _past_sub_blocks(data, position + 11 + _colour_table(flags))
            frames += 1
            position = end
        else:
            position += 1
    if not frames:
        raise ValueError("a GIF without a frame")
    return Header("gif", width, height, frames, duration)


def _colour_table(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _past_sub_blocks(data: bytes, position: int) -> int:
    while data[position]:
        position += data[position] + 1
    return position + 1


def _webp(data: bytes, max_pixels: int) -> Header:
    """https://developers.google.com/speed/webp/docs/riff_container"""
    width = height = frames = duration = 0
    position = 12
    while position < len(data) and frames * width * height <= max_pixels:
        name, size = struct.unpack_from("<4sI", data, position)
        body = position + 8
        if body + size > len(data):
            raise ValueError("the file ends too early")
        if name == b"VP8X":
            width, height = _uint24(data, body + 4) + 1, _uint24(data, body + 7) + 1
        elif name == b"ANMF":
            frames += 1
            duration += _uint24(data, body + 12)
        elif name == b"VP8 " and not width:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, body + 6))
        elif name == b"VP8L" and not width:
            bits = struct.unpack_from("<I", data, body + 1)[0]
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        position = body + size + size % 2
    if not width or not height:
        raise ValueError("a WebP without a picture")
    return Header("webp", width, height, max(frames, 1), duration)


def _uint24(data: bytes, position: int) -> int:
    return struct.unpack_from("<HB", data, position)[0] | data[position + 2] << 16
