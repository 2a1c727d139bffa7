"""Checkpoints: the engine's state of the trained module by rank, and where the run stood.

A checkpoint is written under a temporary name and renamed when all ranks are done, so that a folder named
checkpoint-<n> is whole. The engine's state in it is unpickled: resume only from run folders that you trust.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import Any

from mobius_train.engine.distributed import Distributed
from mobius_train.engine.protocol import Engine
from mobius_train.errors import MobiusError

NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")
STATE = "trainer_state.json"
PACKAGES = ("torch", "deepspeed")


def save(
    output_dir: Path,
    step: int,
    engine: Engine,
    progress: dict[str, Any],
    frozen_hash: str,
    total_limit: int | None,
    distributed: Distributed,
) -> Path:
    """Write output_dir/checkpoint-<step>, then remove the oldest others beyond `total_limit`. All ranks call it.

    Args:
        progress: where the run stands, as JSON values; `load` gives it back.
        frozen_hash: identifies the frozen weights that the trained ones belong to, and that are not saved.
        total_limit: how many checkpoints to keep, this one included; none: all.
    """
    folder = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".{folder.name}.tmp"
    if distributed.is_main:
        for left_behind in output_dir.glob(".checkpoint-*.tmp"):
            shutil.rmtree(left_behind)
        temporary.mkdir(parents=True)
    distributed.barrier()
    engine.save(temporary)
    distributed.barrier()
    if distributed.is_main:
        state = {
            "progress": progress,
            "frozen_weights": frozen_hash,
            "world_size": distributed.world_size,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        (temporary / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        _replace(folder, temporary)
        if total_limit is not None:
            others = [other for other in _whole(output_dir) if other != folder]
            for old in others[: max(0, len(others) + 1 - total_limit)]:
                shutil.rmtree(old)
    distributed.barrier()
    return folder


def find(output_dir: Path, name: str) -> Path:
    """The checkpoint with the most steps for "latest", or the one named checkpoint-<n>; only whole ones.

    Raises:
        MobiusError: there is none of that name.
    """
    existing = _whole(output_dir)
    if name == "latest" and existing:
        return existing[-1]
    for folder in existing:
        if folder.name == name:
            return folder
    there = ", ".join(folder.name for folder in existing) or "none"
    raise MobiusError(
        f"resume_from_checkpoint={name}: no such checkpoint in {output_dir}, which holds {there};"
        " give latest or one of these, or leave it out to start anew in another output_dir"
    )


def load(folder: Path, engine: Engine, frozen_hash: str, distributed: Distributed) -> dict[str, Any]:
    """Restore the engine from a trusted folder; returns the progress that was saved. All ranks call it.

    Raises:
        MobiusError: it belongs to other frozen weights, was written by another number of ranks, or cannot be read.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        frozen_weights, world_size, progress = state["frozen_weights"], state["world_size"], state["progress"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MobiusError(f"cannot read {folder / STATE}: {error!r}; resume from another checkpoint") from error
    if frozen_weights != frozen_hash:
        raise MobiusError(
            f"{folder} was trained beside other frozen weights ({str(frozen_weights)[:12]}…) than those of this run"
            f" ({frozen_hash[:12]}…): give the same pretrained_model_name_or_path and mixed_precision as then"
        )
    if world_size != distributed.world_size:
        raise MobiusError(
            f"{folder} was written by {world_size} rank(s), and this run has {distributed.world_size}:"
            " resume on the same number"
        )
    engine.load(folder)
    return dict(progress)


def _replace(folder: Path, temporary: Path) -> None:
    """Give the finished folder its name; one of that name, from a run that was repeated, makes way."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old.tmp")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)


def _whole(output_dir: Path) -> list[Path]:
    """Whole checkpoints, by their number of steps."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
