"""Whether a job that failed may be tried again: not where it has failed before."""

from __future__ import annotations

import json
from pathlib import Path

from mobius_train.errors import MobiusError

FILE = "failures.jsonl"


def record(output_dir: Path, exit_code: int, job: str) -> int:
    """Note that a run has failed; returns the step that it had done.

    Raises:
        MobiusError: another try would not help: the run has failed at this step before, or had never begun.
    """
    if not (output_dir / "config.yaml").exists():
        raise MobiusError(f"{output_dir} was not begun: what is wrong is told above; mend it and submit again")
    step = _last_step(output_dir / "metrics.jsonl")
    before = _steps(output_dir / FILE)
    with (output_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "exit_code": exit_code, "job": job}) + "\n")
    if step in before:
        raise MobiusError(
            f"{output_dir} has failed after step {step} again: another try would end there too. The log says why;"
            f" submit with output_dir={output_dir} to go on, after removing {output_dir / FILE}"
        )
    return step


def _last_step(metrics: Path) -> int:
    return max(_steps(metrics), default=0)


def _steps(path: Path) -> list[int]:
    """The "step" of each line; a kill may have torn the last one."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return steps
