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


def day(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str, gpu: str | None = None) -> dict[str, Any]:
    """The record after a call."""
    monkeypatch.setattr(gpu_day, "gpu_name", lambda: gpu)
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
    assert all("torch" in item["versions"] for item in record["items"].values())
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


@pytest.mark.distributed
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
    # A benchmark that was stopped has judged nothing.
    (folder / "gpu_memory.json").write_text(json.dumps({"claims": {}, "settings": {"half": HALF}}))


# 7 GB in the process.
HALF = {"measured": {"device": "a GPU", "phases": {"step": {"reserved": 6.5e9}}, "outside": 5e8}, "rows": []}


def missed(folder: Path) -> list[str]:
    return [goal["goal"].split(" of ")[-1] for goal in gpu_day.goals(folder) if not goal["reached"]]


def test_goals_are_judged_from_the_records(tmp_path: Path) -> None:
    from gpu_memory import judge

    assert len(missed(tmp_path)) == 4 + len(judge({}))  # nothing was measured
    records(tmp_path)
    # Of the claims about memory, one is measured.
    open_claims = len(judge({})) - 1
    assert len(missed(tmp_path)) == open_claims
    values = [goal["value"] for goal in gpu_day.goals(tmp_path)]
    assert [value for value in values[3:] if value is not None] == [pytest.approx(7 / 0.3), 7.0]
    records(tmp_path, half=0.6)
    assert len(missed(tmp_path)) == open_claims + 1
    records(tmp_path, **{"tail-2": 0.4})
    assert len(missed(tmp_path)) == open_claims + 1


def test_a_day_does_not_continue_on_another_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gpu_day.json").write_text(json.dumps({"gpu": "NVIDIA H100", "items": {}}))
    with pytest.raises(MobiusError, match=r"measured on NVIDIA H100, and this is NVIDIA H200"):
        day(monkeypatch, tmp_path, gpu="NVIDIA H200")


def test_the_items_are_the_same_in_a_rehearsal(tmp_path: Path) -> None:
    names = [[item.name for item in gpu_day.items(tmp_path, rehearse)] for rehearse in (True, False)]
    assert names[0] == names[1]
    # All settings of the memory benchmark are measured.
    from gpu_memory import SETTINGS

    everything = next(i for i in gpu_day.items(tmp_path, False) if i.name == "memory, all settings")
    assert {setting.name for setting in SETTINGS} <= set(everything.command)
