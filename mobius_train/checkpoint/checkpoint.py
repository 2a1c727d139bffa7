"""Checkpoints: the trained module's state by rank, and where the run stood.

A checkpoint is written under a temporary name and renamed when all ranks are done, so that a folder named
checkpoint-<n> is whole. Its engine state is a pickle of DeepSpeed's: resume from run folders that you trust.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from mobius_train.engine.distributed import Distributed
from mobius_train.engine.protocol import Engine
from mobius_train.errors import MobiusError

NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"


def save(
    output_dir: Path,
    step: int,
    engine: Engine,
    progress: dict[str, Any],
    frozen_hash: str,
    total_limit: int | None,
    distributed: Distributed,
) -> Path:
    """Write output_dir/checkpoint-<step>, then remove the oldest beyond `total_limit`. All ranks call it."""
    folder = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".{folder.name}.tmp"
    if distributed.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    engine.save(temporary)
    distributed.barrier()
    if distributed.is_main:
        state = {
            "progress": progress,
            "frozen_weights": frozen_hash,
            "world_size": distributed.world_size,
            "torch": torch.__version__,
        }
        (temporary / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        if total_limit is not None:
            for old in _all(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    distributed.barrier()
    return folder


def find(output_dir: Path, name: str) -> Path:
    """The checkpoint `latest`, or the one named checkpoint-<n>.

    Raises:
        MobiusError: there is none of that name.
    """
    existing = _all(output_dir)
    if name == "latest" and existing:
        return existing[-1]
    chosen = [folder for folder in existing if folder.name == name]
    if chosen:
        return chosen[0]
    listed = ", ".join(folder.name for folder in existing) or "none"
    raise MobiusError(
        f"resume_from_checkpoint={name}: no such checkpoint in {output_dir}, which holds {listed};"
        " give latest, one of these, or leave it out to start anew in another output_dir"
    )


def load(folder: Path, engine: Engine, frozen_hash: str, distributed: Distributed) -> dict[str, Any]:
    """Restore the engine; returns the progress that was saved. All ranks call it.

    Raises:
        MobiusError: it belongs to other frozen weights, or was written by another number of ranks.
    """
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["frozen_weights"] != frozen_hash:
        raise MobiusError(
            f"{folder} was trained beside other frozen weights ({state['frozen_weights'][:12]}…) than those of this"
            f" run ({frozen_hash[:12]}…): give the same pretrained_model_name_or_path and mixed_precision as then"
        )
    if state["world_size"] != distributed.world_size:
        raise MobiusError(
            f"{folder} was written by {state['world_size']} rank(s), and this run has {distributed.world_size}:"
            " resume on the same number"
        )
    engine.load(folder)
    progress: dict[str, Any] = state["progress"]
    return progress


def _all(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))
