"""From emoji files to webdataset shards: chosen, cut to frames, split, written, indexed."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import webdataset
from PIL import Image
from tqdm import tqdm

from mobius_train.data.headers import Header, read_header
from mobius_train.data.shards import INDEX, describe_shard
from mobius_train.errors import MobiusError
from mobius_train.prepare.emoji import names as emoji

QUALITY, METHOD = 92, 6
MAX_PIXELS = 2**28  # of one file's frames together: 256 px, 72 frames are 2**22
SHARD_SAMPLES = 200  # at most


class Options(NamedTuple):
    """num_frames: of an animation; a still has one. heldout: how many emoji, with all their variants."""

    resolutions: tuple[int, ...] = (64,)
    num_frames: int = 8
    subset: str = "animated-base"
    heldout: int = 64
    seed: int = 0
    processes: int = max(2, os.cpu_count() or 2)


class Prepared(NamedTuple):
    """webp by resolution, or why the file could not be read."""

    file: emoji.EmojiFile
    webp: dict[int, bytes]
    num_frames: int
    fps: float | None
    problem: str | None = None


def prepare(
    packages: Sequence[Path], output: Path, options: Options, overwrite: bool = False
) -> dict[int, dict[str, Any]]:
    """Write `output`/<resolution>/{train,heldout}-*.tar and index.json; returns the indices by resolution.

    All is built in a temporary folder inside `output` and renamed at the end.

    Raises:
        MobiusError: a package is missing or damaged, an output exists, or no clip comes out.
    """
    if options.subset not in emoji.SUBSETS or options.num_frames < 1 or min(options.resolutions) < 1:
        raise MobiusError(f"these parameters make no clips: {options}")
    for resolution in options.resolutions:
        if (output / str(resolution)).exists() and not overwrite:
            raise MobiusError(f"{output / str(resolution)} is there already: give another --output, or --overwrite")
    created = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=output))
    try:
        indices = _build(packages, work, options)
        for resolution in options.resolutions:
            target = output / str(resolution)
            if target.exists():
                target.rename(work / f"old-{resolution}")
            (work / str(resolution)).rename(target)
        created = False
    finally:
        shutil.rmtree(work)
        if created:
            output.rmdir()
    return indices


def _build(packages: Sequence[Path], work: Path, options: Options) -> dict[int, dict[str, Any]]:
    files = emoji.find_files(packages, work / "packages")
    unreadable: dict[str, str] = {}
    headers: dict[str, Header] = {}
    for file in files:
        try:
            headers[file.key] = read_header(file.path.read_bytes(), MAX_PIXELS)
        except (ValueError, OSError) as error:
            unreadable[file.key] = str(error)
    chosen = [file for file in files if file.key in headers and _belongs(file.key, headers[file.key], options.subset)]
    unnamed = sorted(file.key for file in chosen if emoji.names(file.key) is None)
    named = [(file, headers[file.key]) for file in chosen if file.key not in set(unnamed)]
    keys = [file.key for file, _ in named]
    heldout = emoji.heldout_families(keys, options.heldout, options.seed) if keys else set()

    prepared = []
    # Forked, for a spawned process would import all of torch, which it has no use for.
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        results = pool.imap(partial(prepare_file, options=options), named, chunksize=4)
        for result in tqdm(results, total=len(named), desc="preparing emoji", unit="clip"):
            if result.problem is None:
                prepared.append(result)
            else:
                unreadable[result.file.key] = result.problem
    splits = {
        "train": [p for p in prepared if emoji.family(p.file.key) not in heldout],
        "heldout": [p for p in prepared if emoji.family(p.file.key) in heldout],
    }
    for split, clips in splits.items():
        if not clips and (split == "train" or options.heldout):
            raise MobiusError(
                f"no {split} clip: of {len(files)} files {len(chosen)} are {options.subset},"
                f" {len(unreadable)} unreadable {sorted(unreadable)[:3]},"
                f" {len(unnamed)} without a name {unnamed[:3]}"
            )
    record: dict[str, Any] = {
        "sources": sorted({file.source.split("/assets/")[0] for file in files}),
        "parameters": {
            "num_frames": options.num_frames,
            "subset": options.subset,
            "heldout": options.heldout,
            "seed": options.seed,
        },
        "counts": {
            "files": len(files),
            "animated": sum(header.num_frames > 1 for header in headers.values()),
            options.subset: len(chosen),
            **{split: len(clips) for split, clips in splits.items()},
            "unreadable": len(unreadable),
            "unnamed": len(unnamed),
        },
        "unreadable": dict(sorted(unreadable.items())),
        "unnamed": unnamed,
    }
    return {
        resolution: _write(splits, work / str(resolution), resolution, record) for resolution in options.resolutions
    }


def _belongs(key: str, header: Header, subset: str) -> bool:
    animated = header.num_frames > 1
    return {
        "all": True,
        "animated": animated,
        "static": not animated,
        "animated-base": animated and not emoji.has_skin_tone(key),
    }[subset]


def prepare_file(job: tuple[emoji.EmojiFile, Header], options: Options) -> Prepared:
    """One file's frames, evenly over the loop, at every resolution; what is wrong is told, not raised."""
    file, header = job
    num_frames = options.num_frames if header.num_frames > 1 else 1
    fps = num_frames * 1000 / header.duration if num_frames > 1 and header.duration else None
    try:
        if header.num_frames < num_frames:
            raise ValueError(f"{header.num_frames} frames, fewer than {num_frames}")
        if header.width * header.height * header.num_frames > MAX_PIXELS:
            raise ValueError(f"{header.num_frames} frames of {header.width}x{header.height} are too large")
        frames = read_frames(file.path, header.num_frames, num_frames)
        webp = {}
        for resolution in options.resolutions:
            resized = [frame.resize((resolution, resolution), Image.Resampling.LANCZOS) for frame in frames]
            webp[resolution] = encode_webp(resized, round(1000 / fps) if fps else 100)
    # Pillow raises whatever its decoders meet; one bad file must not end the others.
    except Exception as error:
        return Prepared(file, {}, num_frames, fps, f"{type(error).__name__}: {error}")
    return Prepared(file, webp, num_frames, fps)


def read_frames(path: Path, available: int, num_frames: int) -> list[Image.Image]:
    """Frames floor(i·n/F) on white, padded with white to a square.

    Raises:
        ValueError: the decoder sees another number of frames than the header.
    """
    frames = []
    with Image.open(path, formats=("WEBP",)) as image:
        if getattr(image, "n_frames", 1) != available:
            raise ValueError(f"{image.n_frames} frames in place of {available}")  # type: ignore[attr-defined]
        for number in range(num_frames):
            image.seek(number * available // num_frames)
            picture = image.convert("RGBA")
            side = max(picture.size)
            square = Image.new("RGBA", (side, side), "white")
            square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            frames.append(square.convert("RGB"))
    return frames


def encode_webp(frames: list[Image.Image], duration: int, quality: int = QUALITY) -> bytes:
    """An animated WebP of exactly these frames, `duration` ms each."""
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
    if read_header(data, MAX_PIXELS).num_frames == len(frames):
        return data
    # The encoder merges a frame with one before it that looks the same: put the frames together one by one.
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


def _write(splits: dict[str, list[Prepared]], folder: Path, resolution: int, record: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    for split, clips in splits.items():
        if not clips:
            continue
        shards = math.ceil(len(clips) / SHARD_SAMPLES)
        # A fixed time and owner: the same input gives the same bytes.
        with webdataset.ShardWriter(
            f"{folder}/{split}-%06d.tar",
            maxcount=math.ceil(len(clips) / shards),
            verbose=0,
            mtime=0.0,
            user="",
            group="",
        ) as writer:
            for clip in clips:
                writer.write(_sample(clip, resolution))
    shards_index = {path.name: describe_shard(path)._asdict() for path in sorted(folder.glob("*.tar"))}
    parameters = {**record["parameters"], "resolution": resolution, "webp_quality": QUALITY}
    index = {"shards": shards_index, **record, "parameters": parameters}
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return index


def _sample(clip: Prepared, resolution: int) -> dict[str, Any]:
    key = clip.file.key
    description = {
        "caption": emoji.names(key),
        "num_frames": clip.num_frames,
        "fps": None if clip.fps is None else round(clip.fps, 4),
        "codepoints": " ".join(f"U+{part.upper()}" for part in emoji.code_points(key)),
        "animated": clip.num_frames > 1,
        "source": clip.file.source,
    }
    return {
        "__key__": key,
        "json": json.dumps(description, ensure_ascii=False).encode(),
        "webp": clip.webp[resolution],
    }
