from __future__ import annotations

from pathlib import Path

import pytest

from mobius_train.errors import MobiusError
from mobius_train.job.failures import record
from mobius_train.job.run_lock import RunLock


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


def test_a_start_without_a_step_is_no_failure_of_that_step(tmp_path: Path) -> None:
    _run(tmp_path, 7)
    assert record(tmp_path, 1, "job") == 7
    for stepped, retried in ((False, True), (False, False)):
        lock = RunLock(tmp_path)
        if stepped:
            lock.note_step()
        lock.release(failed=True)
        if retried:
            assert record(tmp_path, 143, "job") == 7
        else:
            # Starts that never get to a step are not tried for ever.
            with pytest.raises(MobiusError, match=r"step 7\b"):
                record(tmp_path, 143, "job")
    (tmp_path / "failures.jsonl").write_text('{"step": 7}\n')
    lock = RunLock(tmp_path)
    lock.note_step()
    lock.release(failed=True)
    with pytest.raises(MobiusError, match=r"step 7\b"):  # the control
        record(tmp_path, 1, "job")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": [1]}', "3", "\udcff", '{"step": 1e999}'])
def test_lines_that_are_no_records_are_passed_over(line: str, tmp_path: Path) -> None:
    _run(tmp_path, 7)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\n" + line.encode(errors="surrogateescape") + b"\n")
    assert record(tmp_path, 1, "job") == 7


def test_what_was_never_begun_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=tmp_path.name):
        record(tmp_path, 1, "job")
