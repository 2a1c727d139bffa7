"""Resuming from a checkpoint: selection, compatibility checks, and restoring of the state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mobius_train.checkpoint import random_states
from mobius_train.checkpoint.accepted import LEARNING_RATE, Accepted, note, offer
from mobius_train.checkpoint.changes import changes, differing, recipe_fields
from mobius_train.checkpoint.folders import checkpoints, pointed
from mobius_train.checkpoint.format import NAME, State, random_file
from mobius_train.checkpoint.read import Checkpoint
from mobius_train.checkpoint.saver import Identity
from mobius_train.checkpoint.verify import problems
from mobius_train.config import RunConfig
from mobius_train.dtypes import Dtypes
from mobius_train.engine import contents
from mobius_train.engine.protocol import Engine
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.recipe_files import validated
from mobius_train.ring_shape import RingShape, ring_fields
from mobius_train.run_files import LATEST
from mobius_train.yaml_files import parse_yaml

logger = logging.getLogger(__name__)

NOTHING_ELSE = Accepted()
# An engine's scalars that do not depend on its precision.
NOT_OF_THE_SCALE = ("adam_step", "ema_updates")
# For jobs that requeue themselves: resume from the latest checkpoint if there is one, else start a new run.
AUTO = "auto"


def is_of_another_run(output_dir: Path, name: str) -> bool:
    """Whether resume_from_checkpoint is the path of a checkpoint or run in another folder than the run's own."""
    folder, _ = _place(output_dir, name)
    return folder.resolve() != output_dir.resolve()


def _place(output_dir: Path, name: str) -> tuple[Path, str]:
    """Return the run's folder and the name of a checkpoint in it, which a path can name together."""
    if "/" not in name:
        return output_dir, name
    path = Path(name)
    return (path.parent, path.name) if NAME.fullmatch(path.name) else (path, LATEST)


def find(output_dir: Path, name: str, distributed: Distributed) -> Path | None:
    """Return the requested checkpoint after verifying the hashes of its files. All ranks call it and get the same one.

    "latest" is the checkpoint that the file `latest` names, or the newest good one if that is damaged. "auto" is
    "latest", or None if there is no checkpoint. The path of another run is its latest checkpoint.

    Raises:
        MobiusError: no checkpoint exists, or the requested one is damaged.
    """
    output_dir, name = _place(output_dir, name)
    requested, name = name, LATEST if name == AUTO else name
    candidates, warning = distributed.broadcast_object(_candidates(output_dir, name))
    if requested == AUTO and not candidates:
        return None
    if warning and distributed.is_main:
        logger.warning("%s", warning)
    damaged = []
    for folder in candidates:
        parts = distributed.gather_objects(problems(folder, distributed.rank, distributed.world_size))
        damage = list(dict.fromkeys(problem for part in parts for problem in part))
        if not damage:
            return Path(folder)
        damaged += damage
        if distributed.is_main and name == LATEST:
            logger.warning("%s is damaged and skipped:\n%s", folder, _listed(damage))
    if damaged:
        raise MobiusError(
            f"resume_from_checkpoint={name}: no undamaged checkpoint, resume from another one:\n{_listed(damaged)}"
        )
    if not output_dir.is_dir():
        raise MobiusError(
            f"resume_from_checkpoint={name}: there is no folder {output_dir}. Give the folder of a run, or remove it to"
            " start a new run"
        )
    existing = ", ".join(folder.name for folder in checkpoints(output_dir))
    remedy = "Set it to latest or one of these, or remove it and start a new run in another output_dir"
    if not existing:
        remedy = "Remove resume_from_checkpoint to start a new run"
    raise MobiusError(
        f"resume_from_checkpoint={name}: no such checkpoint in {output_dir}, which contains {existing or 'none'}."
        f" {remedy}"
    )


def how_to_go_on(config: RunConfig, output_dir: Path) -> str:
    """What the user does to go on with a run that ends early, for messages."""
    if config.resume_from_checkpoint == AUTO:
        return "start the same command again"
    return f"start again with output_dir={output_dir} resume_from_checkpoint=latest"


def resume(
    folder: Path,
    engine: Engine,
    identity: Identity,
    distributed: Distributed,
    accepted: Accepted = NOTHING_ELSE,
    frozen_hash: Callable[[torch.dtype], str] | None = None,
) -> dict[str, Any]:
    """Restore a verified checkpoint, print what is other than before, and return its progress. All ranks call it.

    Args:
        accepted: what may be other than in the checkpoint's run.
        frozen_hash: of this run's frozen weights in another type, for another precision.

    Raises:
        MobiusError: the frozen weights or trained parameters differ from this run's, or what was not accepted: the
            precision, global batch size, learning rate or data.
    """
    checkpoint = Checkpoint(folder)
    state = checkpoint.state
    notes = _check_precision(checkpoint, engine.contents().mixed_precision, identity, accepted, frozen_hash)
    batch_notes, left_out = _check_batch(folder, state, identity, distributed.data_size, accepted)
    notes += batch_notes
    notes += _check_learning_rate(checkpoint, identity, accepted)
    notes += _check_data(folder, state, identity, accepted.data)
    notes += changes(checkpoint, engine.contents(), identity, distributed.world_size)
    if distributed.is_main:
        print(*notes, sep="\n", end="\n" if notes else "", flush=True)
    if state.contents.trained != engine.contents().trained:
        _check_ring(folder, checkpoint.config, parse_yaml(identity.config))
    contents.check(str(folder), state.contents, engine.contents())
    scalars = state.scalars
    if state.contents.mixed_precision != engine.contents().mixed_precision:
        # The loss scale of another precision means nothing.
        kept = {name: value for name, value in scalars.items() if name in NOT_OF_THE_SCALE}
        scalars = engine.scalars() | kept
    engine.restore(checkpoint.fill, scalars)
    if state.world_size == distributed.world_size:
        path = folder / random_file(distributed.rank, state.world_size)
        try:
            random_states.put(checkpoint.random_states(distributed.rank))
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
            raise MobiusError(f"{path}: not random states ({type(error).__name__}: {str(error)[:200]})") from error
    progress = dict(state.progress)
    return progress | {"samples_seen": progress["samples_seen"] + left_out} if left_out else progress


def _candidates(output_dir: Path, name: str) -> tuple[list[Path], str]:
    """Return the checkpoints in the order to try, and a warning about the `latest` file, or an empty string."""
    existing = checkpoints(output_dir)[::-1]
    if name != LATEST:
        return [folder for folder in existing if folder.name == name], ""
    target = pointed(output_dir)
    first = [folder for folder in existing if folder.name == target]
    rest = [folder for folder in existing if folder.name != target]
    if first or not existing:
        return first + rest, ""
    what = "is missing" if target is None else f"names {target!r}, which is not a checkpoint"
    if target is not None and NAME.fullmatch(target):
        what = f"names {target}, which does not exist"
    return rest, f"{output_dir / LATEST} {what}: using the newest good checkpoint"


def _check_precision(
    checkpoint: Checkpoint,
    mixed_precision: str,
    identity: Identity,
    accepted: Accepted,
    frozen_hash: Callable[[torch.dtype], str] | None,
) -> list[str]:
    """Compare the precision and the frozen weights, whose hash depends on it; return lines for the user."""
    folder, state = checkpoint.folder, checkpoint.state
    was = state.contents.mixed_precision
    if was != mixed_precision and not accepted.precision:
        raise MobiusError(
            f"{folder} was written with mixed_precision={was!r}, but this run uses {mixed_precision!r}: resume with the"
            f" same value, {offer('precision')}"
        )
    ours = identity.frozen_sha256
    if state.frozen_sha256 != ours and accepted.precision and frozen_hash is not None:
        before = validated(RunConfig, checkpoint.config, f"the recipe in {folder}")
        ours = frozen_hash(Dtypes.of(before).frozen)
    if state.frozen_sha256 != ours:
        raise MobiusError(
            f"{folder} was trained with other frozen weights ({state.frozen_sha256[:12]}…, from {state.frozen_source})"
            f" than this run has ({ours[:12]}…, from {identity.frozen_source}): set pretrained_model_name_or_path,"
            " mixed_precision and frozen_dtype to the original values"
            + ("" if accepted.precision else f". If only the precision is another, restore it, {offer('precision')}")
        )
    if was == mixed_precision and ours == identity.frozen_sha256:
        return []
    return [note("precision", f"mixed_precision was {was}, now {mixed_precision}, or frozen_dtype is another")]


def _check_batch(
    folder: Path, state: State, identity: Identity, world_size: int, accepted: Accepted
) -> tuple[list[str], int]:
    """Compare the global batch size; return lines for the user, and the number of samples that are left out.

    The samples seen are rounded up to whole steps, because a step takes its samples from one bucket.
    """
    was, now = state.global_batch_size, identity.global_batch_size
    if was == now:
        return [], 0
    if accepted.batch:
        left_out = -state.progress.get("samples_seen", 0) % now
        return [note("batch", f"samples per step were {was}, now {now} ({left_out} samples are left out)")], left_out
    per_rank, rest = divmod(was, world_size)
    remedy = (
        f"train_batch_size x gradient_accumulation_steps = {per_rank} on {world_size} rank(s)"
        if rest == 0
        else f"a number of ranks that divides {was}, not {world_size}"
    )
    raise MobiusError(
        f"{folder} was trained with {was} samples per step, but this run has {now}, so samples and learning rates would"
        f" be counted differently. Set {remedy}, {offer('batch')}"
    )


def _check_learning_rate(checkpoint: Checkpoint, identity: Identity, accepted: Accepted) -> list[str]:
    """Compare the fields of the learning rate; return lines for the user."""
    both = [recipe_fields(values) for values in (checkpoint.config, parse_yaml(identity.config))]
    # Values of another version, or of no run, can lack them.
    before, now = ({name: fields[name] for name in LEARNING_RATE if name in fields} for fields in both)
    found = "; ".join(differing(before, now)) if before and now else ""
    if not found:
        return []
    if not accepted.learning_rate:
        raise MobiusError(
            f"{checkpoint.folder} was trained with another learning rate: {found}. Set the same values,"
            f" {offer('learning_rate')}"
        )
    return [note("learning_rate", found)]


def _check_data(folder: Path, state: State, identity: Identity, accepted: bool) -> list[str]:
    """Compare the data with those of the checkpoint; return lines for the user."""
    if identity.data is None:
        return []
    if state.data is None:
        return [
            f"{folder} is of an older version, which did not record its data: whether the clips, the seed and the order"
            " of the samples are still the same cannot be checked"
        ]
    names = [name for name in state.data | identity.data if state.data.get(name) != identity.data.get(name)]
    if not names:
        return []
    listed = _listed(
        [f"{name}: {_short(state.data.get(name))}, now {_short(identity.data.get(name))}" for name in names]
    )
    if not accepted:
        raise MobiusError(
            f"the data differ from those that {folder} was trained with, so samples would come twice or never:\n"
            f"{listed}\nRestore them, or set resume_with_changed_data=true to continue with the new ones"
        )
    return [f"other data than before, as resume_with_changed_data allows:\n{listed}"]


def _short(value: str | None) -> str:
    """Shorten a hash for a message."""
    if value is None:
        return "none"
    return f"{value[:12]}…" if len(value) == 64 else value


def _check_ring(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Name the fields of a ring of another shape, whose parameters do not fit."""
    was, now = (RingShape(**ring_fields(values)) for values in (saved, current))
    if was.different(asdict(now)):
        raise MobiusError(f"{folder} was trained with {was}, but this run has {now}: resume with the same values")


def _listed(problems: list[str]) -> str:
    return "\n".join(f"  - {problem}" for problem in problems)
