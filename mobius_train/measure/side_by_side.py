"""Measure variants of a recipe in separate processes, so that their peaks are independent."""

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
# What Python runs in a process of its own, with the job and the record's path behind it.
WORKER = ("-m", "mobius_train.measure.worker")


@dataclass(frozen=True)
class Job:
    """The measurement of one process.

    Attributes:
        deepspeed: the DeepSpeed JSON; None for FSDP.
        limit_gb: limit of the allocator's GPU memory in GB (1e9 bytes); None for no limit.
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
    """Convert a variant such as `parallel+recompute+data.num_frames=16`, a mode and changes, to overrides.

    Raises:
        MobiusError: the variant does not begin with a mode, or a change is invalid.
    """
    modes = get_args(Mode)
    mode, *changes = variant.split("+")
    if mode not in modes:
        raise MobiusError(f"the variant {variant!r} has no mode: begin with {', '.join(modes)}, then + and changes")
    unknown = [change for change in changes if change != RECOMPUTE and "=" not in change]
    if unknown:
        raise MobiusError(f"the variant {variant!r} contains {unknown[0]!r}: use {RECOMPUTE} or key=value after each +")
    return (f"mode={mode}", *("gradient_checkpointing=true" if c == RECOMPUTE else c for c in changes))


def measure_apart(job: Job, program: Sequence[str] = WORKER) -> dict[str, Any]:
    """Run a job in a new process; returns its record, or `{"error": …}` if it failed."""
    with tempfile.TemporaryDirectory(prefix="measure-") as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, *program, json.dumps(asdict(job)), str(record)]
        result = subprocess.run(command, stdout=sys.stderr, check=False)
        if record.exists():
            found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            return found
    return {"error": f"the measuring process ended with status {result.returncode}; see its messages above"}


def failures(records: dict[str, dict[str, Any]]) -> Sequence[str]:
    """The errors of failed variants."""
    return [f"{name}: {record['error']}" for name, record in records.items() if "error" in record]
