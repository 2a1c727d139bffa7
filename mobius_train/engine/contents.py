"""What an engine's folder in a checkpoint holds, so that it is not loaded into something else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mobius_train.errors import MobiusError

FILE = "engine.json"


@dataclass(frozen=True)
class Contents:
    """How the state was made; `trained` has the trained parameters' shapes by name."""

    engine: str
    zero_stage: int
    mixed_precision: str
    trained: dict[str, list[int]]


def write(folder: Path, contents: Contents) -> None:
    """Put it beside the state."""
    (folder / FILE).write_text(json.dumps(asdict(contents)), encoding="utf-8")


def check(folder: Path, mine: Contents) -> None:
    """Compare with what this run would have written.

    Raises:
        MobiusError: something differs, or nothing can be read.
    """
    try:
        saved = Contents(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise MobiusError(f"cannot read {folder / FILE}: {error}; resume from another checkpoint") from error
    for key in ("engine", "zero_stage", "mixed_precision"):
        then, now = getattr(saved, key), getattr(mine, key)
        if then != now:
            raise MobiusError(
                f"{folder} was written with {key}={then!r}, and this run has {now!r}: resume with the same"
            )
    differing = [
        name for name in {**saved.trained, **mine.trained} if saved.trained.get(name) != mine.trained.get(name)
    ]
    if differing:
        raise MobiusError(
            f"{folder} holds other trained parameters than this run's: {len(differing)} differ, the first is"
            f" {differing[0]}; resume with the same model and mode"
        )
