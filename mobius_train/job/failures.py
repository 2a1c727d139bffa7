"""A record of failures, so that a job is not retried after failing twice at the same step."""

from __future__ import annotations

import json
from pathlib import Path

from mobius_train.errors import MobiusError

FILE = "failures.jsonl"


def record(output_dir: Path, exit_code: int, job: str) -> int:
    """Record a failure of a run and return its last step.

    Raises:
        MobiusError: a retry would not help, because the run failed at this step before or never started.
    """
    if not (output_dir / "config.yaml").exists():
        raise MobiusError(f"the run in {output_dir} did not start: fix the error above and submit again")
    step = _last_step(output_dir / "metrics.jsonl")
    before = _steps(output_dir / FILE)
    with (output_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "exit_code": exit_code, "job": job}) + "\n")
    if step in before:
        raise MobiusError(
            f"{output_dir} failed after step {step} again, so it is not retried. Find the cause in the log. To resume,"
            f" remove {output_dir / FILE} and submit with output_dir={output_dir}"
        )
    return step


def _last_step(metrics: Path) -> int:
    return max(_steps(metrics), default=0)


def _steps(path: Path) -> list[int]:
    """Return the "step" of each line, except of lines that a kill left incomplete."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return steps
