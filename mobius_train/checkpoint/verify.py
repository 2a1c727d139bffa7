"""Is a checkpoint as it was written? Nothing of it is used before that is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from mobius_train.checkpoint.format import MANIFEST, STATE, Manifest, State, files_of, shard_file, step_of
from mobius_train.checkpoint.shard import Range, ranges
from mobius_train.errors import MobiusError
from mobius_train.files import sha256


def problems(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """What is wrong with a checkpoint, each naming the file; empty if nothing is.

    Every file is hashed: each of `world_size` ranks that ask takes its part of them.
    """
    try:
        manifest = Manifest.read(folder)
        if manifest.step != step_of(folder):
            return [f"{folder / MANIFEST}: it is that of step {manifest.step}"]
        damaged = list(_files(folder, manifest, rank, world_size))
        return damaged or list(_structure(folder, manifest))
    except MobiusError as error:
        return [str(error)]


def _files(folder: Path, manifest: Manifest, rank: int, world_size: int) -> Iterator[str]:
    for number, (name, file) in enumerate(sorted(manifest.files.items())):
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            yield f"{path}: not a file of the checkpoint's own"
            continue
        try:
            size = path.stat().st_size
            if size != file.bytes:
                yield f"{path}: {size} bytes, and {file.bytes} were written"
            elif number % world_size == rank and sha256(path) != file.sha256:
                yield f"{path}: its SHA-256 is not that of what was written"
        except OSError as error:
            yield f"{path}: {error.strerror}"


def _structure(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Do files that are as the manifest has them make a checkpoint?"""
    state = State.read(folder)
    if state.progress.get("step") != manifest.step:
        yield f"{folder / STATE}: it is that of step {state.progress.get('step')}"
    if not isinstance(state.world_size, int) or set(manifest.files) != files_of(state.world_size):
        yield f"{folder / MANIFEST}: its files are not those of {state.world_size} rank(s), which {STATE} says wrote it"
        return
    held = index(folder, state.world_size)
    for name in missing_ranges(held):
        yield f"{folder}: its files do not hold all of {name}, or some of it twice"
    shapes = {name: list(parts[0].shape) for name, parts in held.items()}
    if shapes != state.contents.tensors():
        yield f"{folder / STATE}: what it says of the trained parameters is not what the tensors are"


def index(folder: Path, world_size: int) -> dict[str, list[Range]]:
    """Where the ranges of every tensor are, by their order.

    Raises:
        MobiusError: a file cannot be read.
    """
    found: dict[str, list[Range]] = {}
    for rank in range(world_size):
        for name, part in ranges(folder / shard_file(rank, world_size)).items():
            found.setdefault(name, []).append(part)
    return {name: sorted(parts, key=lambda part: part.start) for name, parts in found.items()}


def missing_ranges(held: dict[str, list[Range]]) -> Iterator[str]:
    """The tensors whose ranges do not make a whole."""
    for name, parts in held.items():
        ends = [0, *(part.end for part in parts)]
        starts = [*(part.start for part in parts), math.prod(parts[0].shape)]
        if ends != starts or any(part.shape != parts[0].shape for part in parts):
            yield name
