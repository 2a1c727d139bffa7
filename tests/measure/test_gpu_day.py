"""The benchmark of one GPU in limited time: order, limits, continuation, goals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu_day
import pytest
import torch

from mobius_train.errors import MobiusError


def day(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> dict[str, Any]:
    """The record after a call."""
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "--folder", str(folder), "--rehearse", *options])
    try:
        gpu_day.main()
    finally:
        record: dict[str, Any] = json.loads((folder / "gpu_day.json").read_text())
    return record


def script(name: str, code: str, limit: float = 60) -> gpu_day.Item:
    return gpu_day.Item(name, (sys.executable, "-c", code), limit)


@pytest.mark.distributed
def test_items_that_fail_or_take_too_long_do_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    wanted = [
        script("slow", "import time; time.sleep(600)", limit=1),
        script("broken", f"import pathlib; assert pathlib.Path({str(flag)!r}).exists()"),
        script("good", "print('measured')"),
    ]
    monkeypatch.setattr(gpu_day, "items", lambda *_: wanted)
    with pytest.raises(MobiusError, match=r"(?s)slow: unfinished.*broken: failed"):
        day(monkeypatch, tmp_path)
    record = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [item["status"] for item in record["items"].values()] == ["unfinished", "failed", "done"]
    assert "measured" in (tmp_path / "good.log").read_text()
    assert "torch" in record["versions"]
    # The next call does only what is left.
    flag.touch()
    wanted[0] = script("slow", "pass")
    wanted[2] = script("good", "raise SystemExit(1)")
    record = day(monkeypatch, tmp_path)
    assert {item["status"] for item in record["items"].values()} == {"done"}


def test_without_time_nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_day, "start", lambda *_: pytest.fail("an item started"))
    with pytest.raises(MobiusError, match=r"tests, quick: unfinished"):
        day(monkeypatch, tmp_path, "--minutes", "0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "--folder", str(tmp_path)])
    with pytest.raises(MobiusError, match="no GPU"):
        gpu_day.main()


def records(folder: Path, **ours: float) -> None:
    """Records in which all goals are reached, up to the seconds of a step of these variants."""
    seconds = {"serial": 1.0, "paper": 0.7, "half": 0.4, "tail-2": 0.3} | ours
    table = [
        {"variant": name, "step_seconds": value, "of_serial": value / seconds["serial"], "of_matrix_speed": 0.4}
        for name, value in seconds.items()
    ]
    (folder / "step_time_ours.json").write_text(json.dumps({"table": table}))
    paper = {"variant": "paper", "step_seconds": 7.0}
    (folder / "step_time_paper.json").write_text(json.dumps({"table": [paper]}))
    claims = {"at most 8 GB": {"found": "7 GB", "value": 7.0, "bound": 8, "holds": True}}
    (folder / "gpu_memory.json").write_text(json.dumps({"claims": claims}))


def missed(folder: Path) -> list[str]:
    return [goal["goal"].split(" of ")[-1] for goal in gpu_day.goals(folder) if not goal["reached"]]


def test_goals_are_judged_from_the_records(tmp_path: Path) -> None:
    from gpu_memory import judge

    assert len(missed(tmp_path)) == 4 + len(judge({}))  # nothing was measured
    records(tmp_path)
    assert missed(tmp_path) == []
    assert [goal["value"] for goal in gpu_day.goals(tmp_path)][3:] == [pytest.approx(7 / 0.3), 7.0]
    records(tmp_path, half=0.6)
    assert len(missed(tmp_path)) == 1
    records(tmp_path, **{"tail-2": 0.4})
    assert len(missed(tmp_path)) == 1


def test_the_items_are_the_same_in_a_rehearsal(tmp_path: Path) -> None:
    names = [[item.name for item in gpu_day.items(tmp_path, rehearse)] for rehearse in (True, False)]
    assert names[0] == names[1]
    # All settings of the memory benchmark are measured.
    from gpu_memory import SETTINGS

    everything = next(i for i in gpu_day.items(tmp_path, False) if i.name == "memory, all settings")
    assert {setting.name for setting in SETTINGS} <= set(everything.command)
