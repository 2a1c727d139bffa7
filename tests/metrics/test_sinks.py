"""What is written of a run's metrics: after a kill, a resume, and on a disk that is full for a while."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from mobius_train.metrics.json_lines import JsonLines


def _steps(path: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], next(name for name in line if name != "step")) for line in lines]


def test_a_resumed_run_takes_the_place_of_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    lines.write({"step": 0, "heldout_loss": 2.0})
    for step in (1, 2, 3):
        lines.write({"step": step, "loss": 1.0})
        lines.write({"step": step, "heldout_loss": 1.0})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    lines = JsonLines(path, 2)
    assert _steps(path) == [(0, "heldout_loss"), (1, "loss"), (1, "heldout_loss"), (2, "loss")]
    lines.write({"step": 2, "heldout_loss": 1.0})
    lines.close()
    assert _steps(path)[-1] == (2, "heldout_loss")


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    room = lines._file
    # /dev/full answers every write as a full disk does.
    lines._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with caplog.at_level(logging.ERROR):
        for step in (1, 2):
            lines.write({"step": step, "loss": 1.0})
    assert caplog.text.count(os.strerror(28)) == 1
    assert path.read_text() == ""
    lines._file = room
    lines.write({"step": 3, "loss": 1.0})
    lines.close()
    assert _steps(path) == [(1, "loss"), (2, "loss"), (3, "loss")]
