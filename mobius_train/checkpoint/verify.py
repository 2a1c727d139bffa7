"""Verification of checkpoints before any of their contents are used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from mobius_train.checkpoint.format import MANIFEST, STATE, Manifest, State, files_of, shard_file, step_of
from mobius_train.checkpoint.shard import Range, ranges
from mobius_train.errors import MobiusError
from mobius_train.files import sha256


def problems(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Return the problems of a checkpoint, each with the file's name; empty for a good checkpoint.

    Each of the `world_size` calling ranks hashes its part of the files.
    """
    try:
        manifest = Manifest.read(folder)
        if manifest.step != step_of(folder):
            return [f"{folder / MANIFEST}: it belongs to step {manifest.step}"]
        damaged = list(_files(folder, manifest, rank, world_size))
        return damaged or list(_structure(folder, manifest))
    except MobiusError as error:
        return [str(error)]


def _files(folder: Path, manifest: Manifest, rank: int, world_size: int) -> Iterator[str]:
    for number, (name, file) in enumerate(sorted(manifest.files.items())):
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            yield f"{path}: not a regular file in the checkpoint's folder"
            continue
        try:
            size = path.stat().st_size
            if size != file.bytes:
                yield f"{path}: {size} bytes instead of {file.bytes}"
            elif number % world_size == rank and sha256(path) != file.sha256:
                yield f"{path}: its SHA-256 does not match the manifest"
        except OSError as error:
            yield f"{path}: {error.strerror}"


def _structure(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield inconsistencies between files that match the manifest."""
    state = State.read(folder)
    if state.progress.get("step") != manifest.step:
        yield f"{folder / STATE}: it belongs to step {state.progress.get('step')}"
    # The number of files first: a world_size of a billion would make as many names.
    if len(manifest.files) != 2 + 2 * state.world_size or set(manifest.files) != files_of(state.world_size):
        yield f"{folder / MANIFEST}: its files do not match the {state.world_size} rank(s) that {STATE} records"
        return
    held = index(folder, state.world_size)
    for name in missing_ranges(held):
        yield f"{folder}: parts of {name} are missing or stored twice"
    shapes = {name: list(parts[0].shape) for name, parts in held.items()}
    if shapes != state.contents.tensors():
        yield f"{folder / STATE}: its trained parameters do not match the tensors"


def index(folder: Path, world_size: int) -> dict[str, list[Range]]:
    """Return the ranges of every tensor, sorted by start.

    Raises:
        MobiusError: a file cannot be read.
    """
    found: dict[str, list[Range]] = {}
    for rank in range(world_size):
        for name, part in ranges(folder / shard_file(rank, world_size)).items():
            found.setdefault(name, []).append(part)
    return {name: sorted(parts, key=lambda part: part.start) for name, parts in found.items()}


def missing_ranges(held: dict[str, list[Range]]) -> Iterator[str]:
    """Yield the tensors whose ranges have gaps or overlaps."""
    for name, parts in held.items():
        ends = [0, *(part.end for part in parts)]
        starts = [*(part.start for part in parts), math.prod(parts[0].shape)]
        if ends != starts or any(part.shape != parts[0].shape for part in parts):
            yield name
