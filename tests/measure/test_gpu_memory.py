"""The benchmark of a machine with a GPU: what it refuses, runs, remembers and concludes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import REPOSITORY

from mobius_train.errors import MobiusError
from mobius_train.measure import side_by_side
from mobius_train.measure.versus_plan import PEAK

SCRIPT = REPOSITORY / "benchmarks" / "gpu_memory.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_memory"] = module
    spec.loader.exec_module(module)
    return module


def record(peak: float, seconds: float = 1.0, planned: float | None = None) -> dict[str, Any]:
    """As of a setting that took so many GB, half a GB of it outside of the allocator."""
    measured = {
        "peak": peak * 1e9,
        "outside": 0.5e9,
        "phases": {"forward and backward": {"allocated": peak * 1e9, "reserved": peak * 1e9}},
        "saved": {"ring": 1e9},
        "step_seconds": seconds,
        "device": "a GPU",
    }
    rows = [{"name": PEAK, "planned": (planned or peak) * 1e9, "measured": peak * 1e9}]
    return {"measured": measured, "rows": rows}


def records(benchmark: Any, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of all settings, so that every claim holds."""
    found = {setting.name: record(10.0) for setting in benchmark.SETTINGS}
    found |= {f"serial {precision}": record(20.0, seconds=2.0) for precision in ("fp32", "bf16")}
    found |= {name: record(3.0) for name in ("half", "quarter")}
    return found | changes


def fails(verdicts: dict[str, Any]) -> list[str]:
    return [name for name, verdict in verdicts.items() if not verdict["holds"]]


def test_every_claim_holds_where_it_should(benchmark: Any) -> None:
    assert fails(benchmark.judge(records(benchmark))) == []


@pytest.mark.parametrize(
    ("name", "changed", "failing"),
    [
        ("16 GB", record(15.6), "the paper's workload, 16 GB, in at most 16 GB"),
        ("11 GB", {"error": "out of memory"}, "the paper's workload, 11 GB, in at most 11 GB"),
        ("half", record(7.6), "the paper's workload, half, in at most 8 GB"),
        ("quarter", record(3.6), "the paper's workload, quarter, in at most 4 GB"),
        ("serial fp32", record(15.0, seconds=2.0), "peak of parallel is at most 0.65 of serial's, fp32"),
        ("serial bf16", record(20.0, seconds=1.3), "step of parallel takes at most 0.75 of serial's, bf16"),
        ("full bf16", record(10.0, planned=11.0), "the plan is within 5% of the measured peak in at least 12 settings"),
    ],
)
def test_a_claim_fails_by_itself(benchmark: Any, name: str, changed: dict[str, Any], failing: str) -> None:
    assert fails(benchmark.judge(records(benchmark) | {name: changed})) == [failing]


def test_a_claim_without_its_measurement_fails(benchmark: Any) -> None:
    verdicts = benchmark.judge({"parallel fp32": record(10.0)})
    assert fails(verdicts) == list(verdicts)


def test_with_only_the_claims_about_other_settings_are_open(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = records(benchmark)
    settings = {name: setting.overrides for setting in benchmark.SETTINGS for name in [setting.name]}
    monkeypatch.setattr(
        side_by_side,
        "measure_apart",
        lambda job: found[next(name for name, overrides in settings.items() if overrides == job.overrides)],
    )
    path = tmp_path / "record.json"
    arguments = ("--record", str(path), "--only", "parallel bf16", "serial bf16")
    started(benchmark, monkeypatch, *arguments)
    claims = json.loads(path.read_text())["claims"]
    assert {name for name, claim in claims.items() if claim["holds"]} == {
        name for name in claims if name.endswith("serial's, bf16")
    }
    assert capsys.readouterr().out.count("open ") == len(claims) - 2
    # The control: a claim about the chosen settings fails.
    found["serial bf16"] = record(12.0, seconds=2.0)
    with pytest.raises(MobiusError, match=r"0\.65 of serial's, bf16"):
        started(benchmark, monkeypatch, *arguments, "--again")


def test_a_record_has_one_device(benchmark: Any, tmp_path: Path) -> None:
    one, other = record(1.0), record(1.0)
    benchmark.require_one_device({"a": one, "b": one, "c": {"error": "no memory"}}, tmp_path)
    other["measured"]["device"] = "another GPU"
    with pytest.raises(MobiusError, match=r"another GPU.*--record"):
        benchmark.require_one_device({"a": one, "b": other}, tmp_path)


def started(benchmark: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    benchmark.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_a_machine_without_a_gpu_is_refused(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match="GPU"):
        started(benchmark, monkeypatch, "--record", str(tmp_path / "record.json"))
    assert not (tmp_path / "record.json").exists()


def test_an_interrupted_run_goes_on(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs: list[side_by_side.Job] = []

    def measure_apart(job: side_by_side.Job) -> dict[str, Any]:
        jobs.append(job)
        if len(jobs) == 2:
            raise KeyboardInterrupt
        return record(1.0)

    monkeypatch.setattr(side_by_side, "measure_apart", measure_apart)
    path = tmp_path / "record.json"
    arguments = ("--record", str(path), "--rehearse-on-cpu", "seed=3", "--only", "serial bf16", "parallel fp32")
    with pytest.raises(KeyboardInterrupt):
        started(benchmark, monkeypatch, *arguments)
    started(benchmark, monkeypatch, *arguments)
    assert [job.overrides for job in jobs] == [
        ("seed=3", "mode=parallel"),
        ("seed=3", "mode=serial", "mixed_precision=bf16"),
        ("seed=3", "mode=serial", "mixed_precision=bf16"),
    ]
    found = json.loads(path.read_text())
    assert (list(found["settings"]), found["claims"]) == (["parallel fp32", "serial bf16"], {})


def test_settings_are_enough_and_known(benchmark: Any) -> None:
    assert len({setting.name for setting in benchmark.SETTINGS}) == len(benchmark.SETTINGS) >= 12
    with pytest.raises(MobiusError, match="parallel fp8"):
        benchmark.select(["parallel fp8"])
