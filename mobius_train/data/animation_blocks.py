"""The blocks of GIF and PNG files, and their animation frames as files of their own.

Pillow draws frames on what browsers do not show: the background colour of a GIF, the picture in front of an APNG's
animation, black where a frame without alpha was cleared. Each frame is therefore decoded alone, and drawn by
`pictures.py`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from mobius_train.data.kinds import PNG_SIGNATURE

KEEP, CLEAR, RESTORE = 0, 1, 2


class GifBlock(NamedTuple):
    """A frame of a GIF: its rectangle on the canvas, and the positions of its blocks in the file.

    duration: ms. disposal: as in the file. control: position of its graphic control extension, or None. start, end: of
    its image block.
    """

    left: int
    top: int
    width: int
    height: int
    duration: int
    disposal: int
    control: int | None
    start: int
    end: int


class Patch(NamedTuple):
    """A frame of an animation: a picture file of its own, and how it is drawn on the canvas.

    disposal: KEEP it afterwards, CLEAR its rectangle, or RESTORE what was there. over: draw it over the canvas;
    otherwise it replaces its rectangle, including alpha.
    """

    left: int
    top: int
    width: int
    height: int
    disposal: int
    over: bool
    file: bytes


def gif_blocks(data: bytes) -> Iterator[GifBlock]:
    """The frames of a GIF, https://www.w3.org/Graphics/GIF/spec-gif89a.txt; skips stray bytes, as browsers do.

    Raises:
        IndexError, struct.error: the file ends too early.
    """
    position = 13 + _table_bytes(data[10])
    control: int | None = None
    duration = disposal = 0
    while position < len(data) and data[position] != 0x3B:
        if data[position] == 0x21:  # an extension
            if data[position + 1] == 0xF9:  # the graphic control of the next frame
                control = position
                flags, delay = struct.unpack_from("<BH", data, position + 3)
                duration, disposal = 10 * delay, flags >> 2 & 7
            position = _past_sub_blocks(data, position + 2)
        elif data[position] == 0x2C:
            left, top, width, height, flags = struct.unpack_from("<HHHHB", data, position + 1)
            end = _past_sub_blocks(data, position + 11 + _table_bytes(flags))
            yield GifBlock(left, top, width, height, duration, disposal, control, position, end)
            position, control, duration, disposal = end, None, 0, 0
        else:
            position += 1


def gif_patches(data: bytes) -> Iterator[Patch]:
    """The frames of a GIF; raises as `gif_blocks`."""
    for block in gif_blocks(data):
        size = struct.pack("<HH", block.width, block.height)
        head = data[:6] + size + data[10 : 13 + _table_bytes(data[10])]
        control = b"" if block.control is None else data[block.control : block.control + 8]
        image = b"\x2c" + bytes(4) + size + data[block.start + 9 : block.end]
        disposal = {2: CLEAR, 3: RESTORE}.get(block.disposal, KEEP)
        yield Patch(*block[:4], disposal, True, head + control + image + b";")


def _table_bytes(flags: int) -> int:
    """Bytes of the colour table that the flags of a screen or a frame announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _past_sub_blocks(data: bytes, position: int) -> int:
    while data[position]:
        position += data[position] + 1
    return position + 1


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the contents of each chunk up to IEND, https://www.w3.org/TR/png-3.

    Raises:
        ValueError, struct.error: the file ends too early.
    """
    position, name = len(PNG_SIGNATURE), b""
    while name != b"IEND":
        size, name = struct.unpack_from(">I4s", data, position)
        start, end = position + 8, position + 8 + size
        if end + 4 > len(data):
            raise ValueError("the file ends too early")
        yield name, start, end
        position = end + 4


def png_patches(data: bytes) -> Iterator[Patch]:
    """The frames of an animated PNG, without a picture before the animation; raises as `png_chunks`."""
    shared, frame, pixels = b"", b"", b""
    depth_and_kind = data[24:29]
    for name, start, end in png_chunks(data):
        if name in (b"fcTL", b"IEND") and frame and pixels:
            width, height, left, top = struct.unpack_from(">4I", frame, 4)
            disposal, over = frame[24], bool(frame[25])
            head = _chunk(b"IHDR", struct.pack(">II", width, height) + depth_and_kind)
            file = PNG_SIGNATURE + head + shared + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
            yield Patch(left, top, width, height, disposal, over, file)
        if name == b"fcTL":
            frame, pixels = data[start:end], b""
        elif name == b"IDAT" and frame:
            pixels += data[start:end]
        elif name == b"fdAT":
            pixels += data[start + 4 : end]
        elif name in (b"PLTE", b"tRNS"):
            shared += _chunk(name, data[start:end])


def _chunk(name: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + name + contents + struct.pack(">I", zlib.crc32(name + contents))
