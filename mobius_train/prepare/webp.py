"""Encoding of animated WebP without merging equal frames."""

from __future__ import annotations

import io
import struct

from PIL import Image

from mobius_train.data.headers import read_header
from mobius_train.data.limits import Limits

METHOD = 6  # slowest, smallest output


def encode_webp(frames: list[Image.Image], duration: int, quality: int) -> bytes:
    """Encode a WebP that shows each frame for `duration` ms; `quality` is 0 to 100."""
    buffer = io.BytesIO()
    first, *rest = frames
    first.save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=rest,
        quality=quality,
        method=METHOD,
        duration=duration,
        minimize_size=False,
    )
    data = buffer.getvalue()
    if read_header(data, Limits()).num_frames == len(frames):
        return data
    # The encoder merged frames that look the same: encode each frame separately and join them.
    return _join([_still(frame, quality) for frame in frames], first.size, duration)


def _still(frame: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    frame.save(buffer, "WEBP", quality=quality, method=METHOD)
    return buffer.getvalue()[12:]  # the picture's chunk, without the file's header


def _join(stills: list[bytes], size: tuple[int, int], duration: int) -> bytes:
    """https://developers.google.com/speed/webp/docs/riff_container#animation"""
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in size)
    animated, no_blending = 0b10, 0b10
    chunks = [
        _chunk(b"VP8X", bytes([animated, 0, 0, 0]) + canvas),
        _chunk(b"ANIM", struct.pack("<4BH", 255, 255, 255, 255, 0)),
    ]
    head = bytes(6) + canvas + duration.to_bytes(3, "little") + bytes([no_blending])
    chunks += [_chunk(b"ANMF", head + still) for still in stills]
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
