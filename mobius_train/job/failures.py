"""A record of failures, so that a job is not retried after failing twice at the same step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobius_train.errors import MobiusError
from mobius_train.files import open_regular, publish_lines
from mobius_train.job.run_lock import last_start
from mobius_train.run_files import FAILURES, METRICS, RECIPE


def record(output_dir: Path, exit_code: int, job: str, given: Path | None = None) -> int:
    """Record a failure of a run and return its last step.

    Args:
        given: the job's output_dir, if it is not the run's folder, because the run is a stage.

    Raises:
        MobiusError: a retry would not help, because the run failed at this step before or never started.
    """
    if not (output_dir / RECIPE).exists():
        raise MobiusError(f"the run in {output_dir} did not start: fix the error above and submit again")
    step = _last_step(output_dir / METRICS)
    start = last_start(output_dir)
    # A start that took no step did not fail at the step that an earlier one reached.
    stepped = start is None or start.stepped
    lines = _lines(output_dir / FAILURES)
    before = [line for line in lines if line.get("stepped", True) == stepped]
    failure = {"step": step, "stepped": stepped, "exit_code": exit_code, "job": job}
    publish_lines(output_dir / FAILURES, [*lines, failure])
    if step in [line["step"] for line in before]:
        raise MobiusError(
            f"{output_dir} failed after step {step} again, so it is not retried. Find the cause in the log. To resume,"
            f" remove {output_dir / FAILURES} and submit with output_dir={given or output_dir}"
        )
    return step


def _last_step(metrics: Path) -> int:
    return max((line["step"] for line in _lines(metrics)), default=0)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines with a "step", except those that a kill left incomplete.

    Raises:
        MobiusError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MobiusError(f"cannot read {path}: {error.strerror or error}") from error
    found = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found
