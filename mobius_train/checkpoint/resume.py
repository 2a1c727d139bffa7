"""Going on from a checkpoint: which one, whether it is this run's, and putting its state in place."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mobius_train.checkpoint import random_states
from mobius_train.checkpoint.folders import checkpoints, pointed
from mobius_train.checkpoint.format import LATEST, NAME, State
from mobius_train.checkpoint.read import Checkpoint
from mobius_train.checkpoint.saver import Identity
from mobius_train.checkpoint.verify import problems
from mobius_train.engine import contents
from mobius_train.engine.protocol import Engine
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed

logger = logging.getLogger(__name__)

# Latest if there is any, else a new start: what a job says that is started again by itself.
AUTO = "auto"


def find(output_dir: Path, name: str, distributed: Distributed) -> Path | None:
    """The checkpoint that was asked for, after every file of it was hashed. All ranks call it, and get the same.

    "latest" is the one that the file `latest` names; if that is damaged, the good one with the most steps. "auto" is
    the same, or None where there is no checkpoint.

    Raises:
        MobiusError: there is none, or the one that was asked for by its name is damaged.
    """
    wanted, name = name, LATEST if name == AUTO else name
    candidates, warning = distributed.broadcast_object(_candidates(output_dir, name))
    if wanted == AUTO and not candidates:
        return None
    if warning and distributed.is_main:
        logger.warning("%s", warning)
    found = []
    for folder in candidates:
        parts = distributed.gather_objects(problems(folder, distributed.rank, distributed.world_size))
        damage = list(dict.fromkeys(problem for part in parts for problem in part))
        if not damage:
            return Path(folder)
        found += damage
        if distributed.is_main and name == LATEST:
            logger.warning("%s is damaged, and passed over:\n%s", folder, _listed(damage))
    if found:
        raise MobiusError(
            f"resume_from_checkpoint={name}: no good checkpoint, resume from another one:\n{_listed(found)}"
        )
    there = ", ".join(folder.name for folder in checkpoints(output_dir)) or "none"
    raise MobiusError(
        f"resume_from_checkpoint={name}: no such checkpoint in {output_dir}, which holds {there};"
        " give latest or one of these, or leave it out to start anew in another output_dir"
    )


def resume(folder: Path, engine: Engine, identity: Identity, distributed: Distributed) -> dict[str, Any]:
    """Restore a verified checkpoint; returns the progress that was saved. All ranks call it.

    Raises:
        MobiusError: it is not this run's: other frozen weights, trained parameters, precision or global batch.
    """
    checkpoint = Checkpoint(folder)
    state = checkpoint.state
    _check(folder, state, identity, distributed.world_size)
    contents.check(str(folder), state.contents, engine.contents())
    engine.restore(checkpoint.fill, state.scalars)
    if state.world_size == distributed.world_size:
        random_states.put(checkpoint.random_states(distributed.rank))
    return state.progress


def _candidates(output_dir: Path, name: str) -> tuple[list[Path], str]:
    """The checkpoints to try, the first first, and a warning of the pointer."""
    existing = checkpoints(output_dir)[::-1]
    if name != LATEST:
        return [folder for folder in existing if folder.name == name], ""
    target = pointed(output_dir)
    first = [folder for folder in existing if folder.name == target]
    rest = [folder for folder in existing if folder.name != target]
    if first or not existing:
        return first + rest, ""
    what = "is missing" if target is None else f"names {target!r}, which is no checkpoint here"
    if target is not None and NAME.fullmatch(target):
        what = f"names {target}, which is not there"
    return rest, f"{output_dir / LATEST} {what}: taking the newest good checkpoint"


def _check(folder: Path, state: State, identity: Identity, world_size: int) -> None:
    if state.frozen_sha256 != identity.frozen_sha256:
        raise MobiusError(
            f"{folder} was trained beside other frozen weights ({state.frozen_sha256[:12]}…, from"
            f" {state.frozen_source}) than those of this run ({identity.frozen_sha256[:12]}…, from"
            f" {identity.frozen_source}): give the same pretrained_model_name_or_path and mixed_precision as then"
        )
    if state.global_batch_size != identity.global_batch_size:
        per_rank, rest = divmod(state.global_batch_size, world_size)
        remedy = (
            f"train_batch_size x gradient_accumulation_steps = {per_rank} on {world_size} rank(s)"
            if rest == 0
            else f"a number of ranks that divides {state.global_batch_size}, not {world_size}"
        )
        raise MobiusError(
            f"{folder} was trained with {state.global_batch_size} samples in a step, and this run has"
            f" {identity.global_batch_size}: samples and learning rates would be counted differently. Set {remedy}"
        )


def _listed(problems: list[str]) -> str:
    return "\n".join(f"  - {problem}" for problem in problems)
