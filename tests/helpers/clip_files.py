"""Small real clips and shards for the tests of this folder."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np
from PIL import Image
from torch import Tensor


def pictures(frames: int, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    """Frame i is one grey, 20·i, so that a decoded frame tells its number."""
    return [Image.new("RGB", size, (20 * number,) * 3) for number in range(frames)]


def animation(frames: int, kind: str = "WEBP", size: tuple[int, int] = (16, 16)) -> bytes:
    first, *rest = pictures(frames, size)
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(buffer, kind, save_all=True, append_images=rest, duration=40, **options)
    return buffer.getvalue()


def video(frames: int, suffix: str = ".mp4", size: tuple[int, int] = (32, 32)) -> bytes:
    kinds = {".mp4": ("mp4", "mpeg4"), ".mov": ("mov", "mpeg4"), ".avi": ("avi", "mpeg4"), ".webm": ("webm", "libvpx")}
    kind, codec = kinds[suffix]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for picture in pictures(frames, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def numbers(frames: np.ndarray | Tensor) -> list[int]:
    """Which frame each of (F, 3, H, W) is, by its grey."""
    return [round(float(frame.mean()) / 20) for frame in np.asarray(frames, dtype=float)]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def shard(path: Path, keys: list[str], frames: int = 4) -> Path:
    """A shard of animated WebP with captions in two languages."""
    members = {}
    for key in keys:
        caption = {"en": f"the {key}", "zh": f"这是 {key}"}
        members[f"{key}.json"] = json.dumps({"caption": caption}).encode()
        members[f"{key}.webp"] = animation(frames)
    return write_tar(path, members)
