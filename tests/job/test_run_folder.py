"""One run in a folder, and a folder that a run can write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mobius_train.errors import MobiusError
from mobius_train.job import run_lock
from mobius_train.job.run_folder import RunFolder
from mobius_train.job.run_lock import FILE, Holder, RunLock, last_start


def _held(folder: Path, age: float = 0.0, **changes: Any) -> Holder:
    """The lock of another holder, last touched `age` seconds ago."""
    holder = replace(Holder.of_this_process(), **changes)
    (folder / FILE).write_text(json.dumps(asdict(holder)))
    os.utime(folder / FILE, (time.time() - age,) * 2)
    return holder


def _taken(folder: Path) -> bool:
    lock = RunLock(folder)
    lock.release(failed=False)
    return not (folder / FILE).exists()


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = RunFolder(tmp_path / "run", None)
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    for resume in (None, "auto"):
        with pytest.raises(MobiusError, match=rf"job 4711, process {os.getpid()} on "):
            RunFolder(tmp_path / "run", resume)
    with first:
        (tmp_path / "run" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    with RunFolder(tmp_path / "run", "auto"):
        pass


@pytest.mark.distributed
def test_the_lock_of_a_holder_that_is_over_is_taken(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _held(tmp_path, process=ended.pid)
    assert _taken(tmp_path)
    # Its number belongs to another process now.
    _held(tmp_path, born="1")
    assert _taken(tmp_path)
    _held(tmp_path, ended=True)
    assert _taken(tmp_path)
    # Of another node, which has been silent for long, whatever the file says.
    _held(tmp_path, age=run_lock.SILENT + 5, place="0" * 8)
    assert _taken(tmp_path)
    (tmp_path / FILE).write_text("[" * 100_000)
    os.utime(tmp_path / FILE, (0, 0))
    assert _taken(tmp_path)


def test_a_beat_from_another_node_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _held(tmp_path, age=20, place="0" * 8, node="n7")
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.utime(tmp_path / FILE))
    with pytest.raises(MobiusError, match="on n7"):
        RunLock(tmp_path)


def test_a_lock_from_the_future_is_taken_once_it_has_been_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clock was set back after its last touch."""
    monkeypatch.setattr(run_lock, "SILENT", 1.0)
    _held(tmp_path, age=-3600, place="0" * 8, node="n7")
    assert _taken(tmp_path)
    assert capsys.readouterr().out.count("waiting for a sign of the run") == 1


def test_a_start_of_the_same_job_waits_for_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    _held(tmp_path)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: (tmp_path / FILE).unlink())
    assert _taken(tmp_path)


def test_a_lock_that_another_took_meanwhile_is_given_back(tmp_path: Path) -> None:
    _held(tmp_path, token="old", ended=True)
    seen = run_lock._look(tmp_path / FILE)
    assert seen is not None
    new = _held(tmp_path, token="new")
    run_lock._displace(tmp_path / FILE, seen)
    assert last_start(tmp_path) == new
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_holder_touches_its_lock_and_ends_when_it_has_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[Holder] = []
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    monkeypatch.setattr(RunLock, "_end", lambda self, other: ends.append(other))
    lock = RunLock(tmp_path)
    os.utime(tmp_path / FILE, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / FILE).stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ends == []
    other = _held(tmp_path)
    while not ends and time.monotonic() < deadline:
        time.sleep(0.01)
    lock.release(failed=False)
    assert ends[0] == other


def test_starts_in_the_same_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    for pattern in ("run-{time}", "{time}/run"):
        folders = [RunFolder(tmp_path / pattern, None) for _ in range(3)]
        assert len({folder.path for folder in folders}) == 3
        assert [str(f.path.relative_to(tmp_path)) for f in folders] == [
            pattern.replace("{time}", f"20260101-000000{end}") for end in ("", "-2", "-3")
        ]
        for folder in folders:
            folder.__exit__(None, None, None)


def test_a_start_that_ended_before_its_first_step_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(MobiusError, match="not empty"):
        RunFolder(tmp_path, None)
    (tmp_path / "overview.txt").touch()
    with RunFolder(tmp_path, None) as folder:
        assert folder.path == tmp_path
    (tmp_path / "config.yaml").touch()
    with pytest.raises(MobiusError, match="not empty"):
        RunFolder(tmp_path, None)


def test_a_folder_that_was_made_and_left_empty_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "a" / "b", None):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    # What was there, or has contents, stays.
    (tmp_path / "kept").mkdir()
    with RunFolder(tmp_path / "kept", None):
        pass
    with RunFolder(tmp_path / "a" / "b", None) as folder:
        (folder.path / "x").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "kept", "x"]


def _file(path: Path) -> None:
    path.touch()


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("logs", _file),
        ("samples", _file),
        ("final", _link_to_nothing),
        ("metrics.jsonl", Path.mkdir),
        ("metrics.jsonl", os.mkfifo),
        ("metrics.jsonl", lambda path: path.write_bytes(b'{"step": 1}\n\xff')),
        ("metrics.jsonl", lambda path: path.symlink_to("/dev/full")),
        ("latest", Path.mkdir),
        ("config.yaml", _link_to_nothing),
        (FILE, Path.mkdir),
        (FILE, _link_to_nothing),
    ],
)
def test_what_a_run_cannot_write_is_an_error_with_its_name(name: str, make: Any, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(MobiusError, match=name if name != FILE else tmp_path.name):
        RunFolder(tmp_path, "auto")
    # Nothing else has been made or removed.
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("below", ["file/run", "link/run", "file"])
def test_a_folder_that_cannot_be_made_is_an_error(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(MobiusError, match="output_dir="):
        RunFolder(tmp_path / below, None)


def test_a_read_only_disk_is_an_error() -> None:
    with pytest.raises(MobiusError, match="output_dir"):
        RunFolder(Path("/proc/run"), None)
    with pytest.raises(MobiusError, match="output_dir"):
        RunFolder(Path("/proc/self"), "auto")
