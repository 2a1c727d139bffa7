"""Measures several variants of a recipe, each in a process of its own, so that no peak is another's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from mobius_train.config import Mode
from mobius_train.errors import MobiusError

RECOMPUTE = "recompute"


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        deepspeed: the DeepSpeed JSON; None: FSDP is the engine.
        limit_gb: of GPU memory (1e9 bytes) that its allocator may take; None for all.
    """

    config: str
    overrides: tuple[str, ...]
    deepspeed: str | None
    warmup: int = 2
    steps: int = 3
    random_models: bool = False
    snapshot: str | None = None
    limit_gb: float | None = None


def overrides_of(variant: str) -> tuple[str, ...]:
    """`parallel+recompute+data.num_frames=16`: a mode, then what is different from the recipe, as overrides.

    Raises:
        MobiusError: it begins with no mode, or a part is not understood.
    """
    modes = get_args(Mode)
    mode, *changes = variant.split("+")
    if mode not in modes:
        raise MobiusError(f"the variant {variant!r} begins with no mode: write {', '.join(modes)}, then + and changes")
    unknown = [change for change in changes if change != RECOMPUTE and "=" not in change]
    if unknown:
        raise MobiusError(f"the variant {variant!r} has {unknown[0]!r}: write {RECOMPUTE} or key=value after each +")
    return (f"mode={mode}", *("gradient_checkpointing=true" if c == RECOMPUTE else c for c in changes))


def measure_apart(job: Job) -> dict[str, Any]:
    """The record of one job, or `{"error": …}` where it failed."""
    with tempfile.TemporaryDirectory(prefix="measure-") as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", "mobius_train.measure.worker", json.dumps(asdict(job)), str(record)]
        result = subprocess.run(command, stdout=sys.stderr, check=False)
        if record.exists():
            found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            return found
    return {"error": f"the process that measures ended with status {result.returncode}; its messages are above"}


def failures(records: dict[str, dict[str, Any]]) -> Sequence[str]:
    """What went wrong, by variant."""
    return [f"{name}: {record['error']}" for name, record in records.items() if "error" in record]
