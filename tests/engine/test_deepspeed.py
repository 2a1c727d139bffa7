"""The DeepSpeed engine on one, two and four ranks: every ZeRO stage in every precision, on a small module.

Each number of ranks is one launch of engine_worker.py, which goes through all cases; the tests read what it saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import launch

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
PRECISIONS = ("no", "bf16", "fp16")
CASES = [f"{stage}:{precision}" for stage in STAGES for precision in PRECISIONS]
RANKS = (1, 2, 4)
# Relative. float32 differs in the order of sums; in 16 bits gradients are rounded before they are summed over ranks.
TOLERANCE = {"no": 1e-6, "bf16": 1e-2, "fp16": 1e-3}

pytestmark = pytest.mark.distributed


def _each(seen: dict[int, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for ranks, cases in seen.items():
        assert set(cases) == set(CASES)
        for case, mine in cases.items():
            yield f"{case} on {ranks} rank(s)", mine


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the worker saw, by number of ranks and case."""
    folder = tmp_path_factory.mktemp("engine")
    worker = Path(__file__).parent / "engine_worker.py"
    for ranks in RANKS:
        result = launch(ranks, worker, str(REPOSITORY / "ds_configs"), str(folder), ",".join(CASES))
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return {ranks: json.loads((folder / f"{ranks}-ranks.json").read_text()) for ranks in RANKS}


def test_weights_guard_and_average(seen: dict[int, dict[str, Any]]) -> None:
    for where, mine in _each(seen):
        # The first step is from the weights that were given, not from their 16-bit roundings, and they move.
        assert mine["starts_from_given_weights"], where
        assert mine["moved"], where
        # A NaN gradient and an infinite loss, on one rank's last micro-batch: nowhere applied, nothing changed.
        assert mine["not_applied"] == [True, True], where
        assert mine["kept"] == [True, True], where
        # The average is that of a plain implementation over the whole float32 weights.
        assert mine["ema_error"] < 1e-6, where
        assert all(0 < norm < float("inf") for norm in mine["norms"]), where


def test_a_loaded_engine_goes_on_bit_for_bit(seen: dict[int, dict[str, Any]]) -> None:
    for where, mine in _each(seen):
        assert mine["differs_before_loading"], where
        assert mine["resumed_exactly"], where
        assert mine["progress"] == {"step": 4}, where
        assert "other frozen weights" in mine["refused"], where


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_global_batch_decides_and_not_how_it_is_spread(seen: dict[int, dict[str, Any]], precision: str) -> None:
    reference = seen[1][f"zero0:{precision}"]
    tolerance = TOLERANCE[precision]
    assert len(set(reference["losses"])) == len(reference["losses"])
    for ranks in RANKS:
        for stage in STAGES:
            mine = seen[ranks][f"{stage}:{precision}"]
            assert mine["losses"] == pytest.approx(reference["losses"], rel=tolerance), (ranks, stage)
            assert mine["norms"] == pytest.approx(reference["norms"], rel=tolerance), (ranks, stage)


def test_the_control_precisions_differ(seen: dict[int, dict[str, Any]]) -> None:
    full, half = seen[1]["zero2:no"]["losses"], seen[1]["zero2:bf16"]["losses"]
    assert full != pytest.approx(half, rel=1e-6)
