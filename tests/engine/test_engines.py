"""Both engines on one, two and four ranks: every ZeRO stage and sharding in every precision, on a small module.

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
ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp", "fsdp_offload")
PRECISIONS = ("no", "bf16", "fp16")
RANKS = (1, 2, 4)
# Two groups of two ranks.
HYBRID = "fsdp_hybrid"
# Relative. float32 differs in the order of sums; in 16 bits gradients are rounded before they are summed over ranks.
TOLERANCE = {"no": 1e-6, "bf16": 1e-2, "fp16": 1e-3}

pytestmark = pytest.mark.distributed


def _engines(ranks: int) -> tuple[str, ...]:
    return (*ENGINES, HYBRID) if ranks == 4 else ENGINES


def _cases(ranks: int) -> list[str]:
    return [f"{engine}:{precision}" for engine in _engines(ranks) for precision in PRECISIONS]


def _each(seen: dict[int, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for ranks, cases in seen.items():
        assert set(cases) == set(_cases(ranks))
        for case, mine in cases.items():
            yield f"{case} on {ranks} rank(s)", mine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[int, dict[str, Any]]:
    """What the worker saw, by number of ranks and case."""
    worker = Path(__file__).parent / "engine_worker.py"
    for ranks in RANKS:
        result = launch(ranks, worker, str(REPOSITORY / "ds_configs"), str(folder), ",".join(_cases(ranks)))
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
        for engine in _engines(ranks):
            mine = seen[ranks][f"{engine}:{precision}"]
            assert mine["losses"] == pytest.approx(reference["losses"], rel=tolerance), (ranks, engine)
            assert mine["norms"] == pytest.approx(reference["norms"], rel=tolerance), (ranks, engine)


# All to all in float32; in 16 bits each stage from the one before it and from fewer or more ranks.
ALL = ("zero0", "zero1", "zero2", "zero3", "fsdp")
MOVES = [f"{ranks}-{engine}-no>{target}" for ranks in RANKS for engine in ALL for target in ALL]
MOVES += [f"4-{HYBRID}-no>{target}" for target in ALL]
MOVES += ["2-zero1-bf16>zero3", "2-zero1-bf16>zero0", "4-zero3_offload-fp16>zero2", "4-zero3_offload-fp16>fsdp"]
MOVES += ["1-zero0-fp16>zero1", "1-zero0-fp16>zero3_offload", "2-fsdp-fp16>zero2", "2-fsdp-fp16>fsdp"]
MOVES += ["4-zero2_offload-bf16>zero3", "4-zero2_offload-bf16>fsdp_offload", f"4-{HYBRID}-bf16>zero2_offload"]


@pytest.fixture(scope="module")
def moved(seen: dict[int, dict[str, Any]], folder: Path) -> dict[int, dict[str, Any]]:
    """What went on from each saved state of `seen` on each number of ranks, by number of ranks and move."""
    worker, found = Path(__file__).parent / "moves_worker.py", {}
    for ranks in RANKS:
        result = launch(ranks, worker, str(REPOSITORY / "ds_configs"), str(folder), ",".join(MOVES))
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        found[ranks] = json.loads((folder / f"{ranks}-moves.json").read_text())
    return found


def test_a_state_moves_to_any_number_of_ranks_and_any_engine(
    seen: dict[int, dict[str, Any]], moved: dict[int, dict[str, Any]]
) -> None:
    for ranks, moves in moved.items():
        assert list(moves) == MOVES
        for move, mine in moves.items():
            where = f"{move} on {ranks} rank(s)"
            then, stage, precision = move.partition(">")[0].split("-")
            # The state itself moves bit for bit; what follows differs as on other ranks from the start.
            assert mine["differs_before_loading"], where
            assert mine["same_weights"], where
            assert mine["same_pieces"], where
            # Stage 0's loss scaler has no hysteresis to save.
            assert mine["scalars"] or precision == "fp16", where
            assert mine["losses"] == pytest.approx(
                seen[int(then)][f"{stage}:{precision}"]["losses"][4:], rel=TOLERANCE[precision]
            ), where


def test_the_control_precisions_differ(seen: dict[int, dict[str, Any]]) -> None:
    full, half = seen[1]["zero2:no"]["losses"], seen[1]["zero2:bf16"]["losses"]
    assert full != pytest.approx(half, rel=1e-6)
