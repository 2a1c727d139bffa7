"""Small real inputs and recipes for the tests of this folder."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from mobius_train.prepare.candidate import Candidate
from mobius_train.prepare.recipe import PrepareConfig

DECODE_TO_SHARDS = (
    {"name": "decode"},
    {"name": "static"},
    {"name": "choose_frames", "count": 5},
    {"name": "buckets", "sizes": [[16, 16]]},
    {"name": "deduplicate"},
)


def moving(frames: int = 8, size: tuple[int, int] = (32, 32), seed: int = 0) -> np.ndarray:
    """(F, H, W, 3): a bright square that goes to the right over a dark, smooth ground that the seed chooses."""
    width, height = size
    coarse = np.random.default_rng(seed).integers(0, 90, (4, 4, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    clip = np.repeat(ground[None], frames, axis=0)
    side = max(1, min(size) // 4)
    for number in range(frames):
        left = (number * max(1, width // 8)) % max(1, width - side + 1)
        clip[number, height // 4 : height // 4 + side, left : left + side] = (255, 220, 40 + 10 * (seed % 20))
    return clip


def animation(clip: np.ndarray, kind: str = "WEBP", duration: Any = 40) -> bytes:
    first, *rest = [Image.fromarray(frame) for frame in clip]
    buffer = io.BytesIO()
    options = {"WEBP": {"lossless": True}, "GIF": {}, "PNG": {}}[kind]
    first.save(buffer, kind, save_all=True, append_images=rest, duration=duration, **options)
    return buffer.getvalue()


def video(clip: np.ndarray, kind: str = "mp4", rate: int = 25) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        stream.options = {"qscale": "2"}
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def heap(folder: Path, count: int) -> Path:
    """A folder of moving clips with captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"clip{number:03d}.webp").write_bytes(animation(moving(seed=number)))
        (folder / f"clip{number:03d}.txt").write_text(f"a square, the {number}th", encoding="utf-8")
    return folder


def recipe(folder: Path, *sources: dict[str, Any], stages: Any = DECODE_TO_SHARDS, **more: Any) -> PrepareConfig:
    return PrepareConfig.model_validate({"sources": sources, "stages": stages, "output_dir": folder, **more})


def rows(output: Path) -> list[dict[str, Any]]:
    with (output / "index.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def result(output: Path) -> dict[str, str]:
    """The hash of each shard and of the index: they must not depend on how they were made."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [*sorted(output.glob("*.tar")), output / "index.jsonl", output / "index.json"]
    }


def clip(frames: np.ndarray, fps: float = 10.0, key: str = "a", **more: Any) -> Candidate:
    return Candidate(key, key, key, frames=frames, fps=fps, start=0.0, end=len(frames) / fps, **more)
