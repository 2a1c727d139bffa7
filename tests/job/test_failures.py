from __future__ import annotations

from pathlib import Path

import pytest

from mobius_train.errors import MobiusError
from mobius_train.job.failures import record


def _run(folder: Path, last_step: int) -> None:
    (folder / "config.yaml").touch()
    # A kill has torn the last line.
    (folder / "metrics.jsonl").write_text(f'{{"step": {last_step}, "loss": 1.0}}\n{{"step": 99')


def test_each_step_may_fail_once(tmp_path: Path) -> None:
    for step in (7, 9, 8):
        _run(tmp_path, step)
        assert record(tmp_path, 137, "job") == step
    _run(tmp_path, 9)
    with pytest.raises(MobiusError, match=r"step 9\b"):
        record(tmp_path, 137, "job")


def test_what_was_never_begun_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=tmp_path.name):
        record(tmp_path, 1, "job")
