"""The benchmark of step times: what it compares, continues and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import step_time

from mobius_train.errors import MobiusError
from mobius_train.measure import side_by_side

REPOSITORY = Path(__file__).parents[2]


def found(seconds: float, gflop: float = 10.0) -> dict[str, Any]:
    """What a process measures."""
    return {
        "measured": {
            "step_seconds": seconds,
            "seconds": {"forward: ring": seconds * 0.25, "backward": seconds * 0.75},
            "saved": {"ring": 2**20, "spatial": 2**20},
            "peak": None,
            "resident_set": 5,
            "device": "cpu",
        },
        "planned": {"flops": {"forward": gflop * 4e8, "backward": gflop * 6e8}, "trained": 7},
        "config": {"gradient_accumulation_steps": 1},
        "versions": {},
    }


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the variants in the order of their measurement; the machine becomes slower with each round."""
    order: list[str] = []
    names = {overrides: name for name, overrides in step_time.VARIANTS.items()}

    def measure(job: side_by_side.Job, program: tuple[str, ...]) -> dict[str, Any]:
        assert program == side_by_side.WORKER
        order.append(names[job.overrides])
        slower = 2 ** (len(order) - 1 >= 2)
        return found((4.0 if order[-1] == "serial" else 1.0) * slower, 20.0 if order[-1] == "serial" else 10.0)

    monkeypatch.setattr(side_by_side, "measure_apart", measure)
    monkeypatch.setattr(step_time, "matrix_flops", lambda *_: 20e9)
    return order


def benchmark(monkeypatch: pytest.MonkeyPatch, record: Path, *options: str) -> dict[str, Any]:
    command = ["step_time.py", "--record", str(record), "--variants", "serial", "tail-2", "--rounds", "2", *options]
    monkeypatch.setattr(sys, "argv", command)
    step_time.main()
    result: dict[str, Any] = json.loads(record.read_text())
    return result


def test_variants_are_measured_in_turn_and_compared_round_by_round(
    machine: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = benchmark(monkeypatch, tmp_path / "record.json")
    assert machine == ["serial", "tail-2"] * 2
    serial, tail = record["table"]
    assert (serial["of_serial"], tail["of_serial"]) == (1, 0.25)
    assert (tail["gflop"], tail["gflop_of_serial"], tail["saved_mib"]) == (10, 0.5, 2)
    assert (tail["peak_mib"] * 2**20, tail["trained"]) == (5, 7)
    # 10 GFLOP in 1 and in 2 seconds at 20 GFLOP/s.
    assert tail["of_matrix_speed"] == pytest.approx((0.5 + 0.25) / 2)
    assert tail["share"] == {"forward: ring": 0.25, "backward": 0.75}
    assert "| tail-2 | 1.500 | 0.25 | 10 | 0.50 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "step_time_cpu",
        "step_time_sd21_cpu",
        "step_time_sd3_cpu",
        "step_time_int8_cpu",
        "peers_cpu",
        "peers_serial_cpu",
        "step_time_trained_tail_cpu",
    ],
)
def test_the_page_has_the_tables_of_the_records(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / f"{name}.json").read_text())
    assert record["table"] == step_time.table(record["measured"])
    step_time.show(record["table"])
    table = capsys.readouterr().out
    assert "| serial |" in table
    assert table in (REPOSITORY / "docs" / "speed.md").read_text()


def test_the_help_quotes_names_with_commas(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--help"])
    with pytest.raises(SystemExit):
        step_time.main()
    words = " ".join(capsys.readouterr().out.split())
    assert "some of: serial full" in words
    assert " 'half, frozen compiled' 'half, frozen channels_last' " in words


def test_it_continues_from_its_record(machine: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    benchmark(monkeypatch, tmp_path / "record.json", "--rounds", "1")
    machine.clear()
    benchmark(monkeypatch, tmp_path / "record.json")
    assert machine == ["serial", "tail-2"]
    with pytest.raises(MobiusError, match=r"another steps"):
        benchmark(monkeypatch, tmp_path / "record.json", "--steps", "9")


def test_a_variant_that_fails_is_named(machine: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure_apart = side_by_side.measure_apart

    def without_memory(job: side_by_side.Job, program: tuple[str, ...]) -> dict[str, Any]:
        serial = job.overrides == step_time.VARIANTS["serial"]
        return {"error": "no memory"} if serial else measure_apart(job, program)

    monkeypatch.setattr(side_by_side, "measure_apart", without_memory)
    path = tmp_path / "record.json"
    with pytest.raises(MobiusError, match=r"serial: no memory"):
        benchmark(monkeypatch, path)
    # The others are measured all the same.
    record = json.loads(path.read_text())
    assert machine == ["tail-2"] * 2
    assert [row["variant"] for row in record["table"]] == ["tail-2"]
    with pytest.raises(MobiusError, match=r"--rounds 0"):
        benchmark(monkeypatch, tmp_path / "record.json", "--rounds", "0")
