"""Both engines on one, two and four ranks: every ZeRO stage and sharding in every precision, on a small module.

Each number of ranks is one launch of engine_worker.py, which goes through all cases and writes the numbers that it saw,
and one of moves_worker.py, which goes on from states that other engines and numbers of ranks saved.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from launching import launch
from recipes import DS_CONFIGS

ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp", "fsdp_offload")
PRECISIONS = ("no", "bf16", "fp16")
RANKS = (1, 2, 4)
# Two groups of two ranks.
HYBRID = "fsdp_hybrid"
# Relative. float32 differs in the order of sums; in 16 bits gradients are rounded before they are summed over ranks.
TOLERANCE = {"no": 1e-6, "bf16": 1e-2, "fp16": 1e-3}
SAVED_STEP = 4

pytestmark = pytest.mark.distributed


class Case(NamedTuple):
    engine: str
    precision: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.ranks}-{self.engine}-{self.precision}"


# In float32 every engine on two ranks, and on four those that hold a fourth of something. Each engine in each 16-bit
# precision once. The first case of each precision is the reference of the others.
CASES = [Case("zero0", precision, 1) for precision in PRECISIONS]
CASES += [Case(engine, "no", 2) for engine in ENGINES]
CASES += [Case(engine, "no", 1) for engine in ("zero3", "fsdp")]
CASES += [Case(engine, "no", 4) for engine in ("zero1", "zero3", "fsdp", HYBRID)]
CASES += [Case(engine, "bf16", 2) for engine in ("zero1", "zero3", "zero2_offload", "fsdp")]
CASES += [Case(engine, "bf16", 1) for engine in ("zero2", "zero3_offload", "fsdp_offload")]
CASES += [Case(engine, "fp16", 2) for engine in ("zero2", "zero3_offload", "fsdp_offload")]
CASES += [Case(engine, "fp16", 1) for engine in ("zero1", "zero2_offload")]
CASES += [Case(engine, "fp16", 4) for engine in ("zero3", "fsdp")] + [Case(HYBRID, "bf16", 4)]


class Move(NamedTuple):
    source: Case
    engine: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.source}>{self.ranks}-{self.engine}"


# In float32 every engine is twice a source and twice a target, and each change of ranks comes up.
MOVES = [
    Move(Case("zero0", "no", 2), "zero1", 4),
    Move(Case("zero1", "no", 2), "zero2", 1),
    Move(Case("zero2", "no", 2), "zero3", 4),
    Move(Case("zero3", "no", 2), "fsdp", 1),
    Move(Case("fsdp", "no", 2), "zero0", 4),
    Move(Case("zero1", "no", 4), "fsdp", 2),
    Move(Case("zero3", "no", 4), "zero0", 1),
    Move(Case("fsdp", "no", 4), "zero3", 2),
    Move(Case("zero0", "no", 1), "zero2", 2),
    Move(Case("zero2", "no", 2), "zero1", 1),
    Move(Case(HYBRID, "no", 4), "zero3", 1),
    Move(Case(HYBRID, "no", 4), "fsdp", 2),
    Move(Case("zero2", "no", 2), HYBRID, 4),
]
# In 16 bits the engine keeps float32 weights beside the ones it computes with; each does that in its own way.
MOVES += [
    Move(Case("zero1", "bf16", 2), "zero3", 4),
    Move(Case("zero2_offload", "bf16", 2), "fsdp_offload", 1),
    Move(Case(HYBRID, "bf16", 4), "zero2_offload", 2),
    Move(Case("zero0", "fp16", 1), "zero3_offload", 4),
    Move(Case("zero3_offload", "fp16", 2), "fsdp", 1),
    Move(Case("fsdp", "fp16", 4), "zero2", 2),
]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_move = pytest.mark.parametrize("move", MOVES, ids=str)


def _launch(worker: str, ranks: int, folder: Path, names: list[str], result: str) -> dict[str, Any]:
    arguments = (str(DS_CONFIGS), str(folder), ",".join(names))
    finished = launch(ranks, Path(__file__).parent / worker, *arguments)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / f"{ranks}-{result}.json").read_text())
    assert list(found) == names
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[Case, dict[str, Any]]:
    """The numbers that engine_worker.py saw."""
    found: dict[Case, dict[str, Any]] = {}
    for ranks in RANKS:
        cases = [case for case in CASES if case.ranks == ranks]
        names = [f"{case.engine}:{case.precision}" for case in cases]
        numbers = _launch("engine_worker.py", ranks, folder, names, "ranks")
        found |= dict(zip(cases, numbers.values(), strict=True))
    return found


@pytest.fixture(scope="module")
def moved(seen: dict[Case, dict[str, Any]], folder: Path) -> dict[Move, dict[str, Any]]:
    """The numbers that moves_worker.py saw, which starts from the states that `seen` left."""
    found: dict[Move, dict[str, Any]] = {}
    for ranks in RANKS:
        moves = [move for move in MOVES if move.ranks == ranks]
        numbers = _launch("moves_worker.py", ranks, folder, [f"{m.source}>{m.engine}" for m in moves], "moves")
        found |= dict(zip(moves, numbers.values(), strict=True))
    return found


@each_case
def test_training_starts_from_the_given_weights(seen: dict[Case, dict[str, Any]], case: Case) -> None:
    mine = seen[case]
    # Not from their 16-bit roundings.
    assert mine["start_difference"] == 0
    assert mine["moved"] > 1e-3
    assert all(0 < norm < math.inf for norm in mine["norms"]), mine["norms"]


@each_case
def test_a_non_finite_step_changes_nothing(seen: dict[Case, dict[str, Any]], case: Case) -> None:
    """A NaN gradient and an infinite loss, on one rank's last micro-batch."""
    bad_steps = seen[case]["bad_steps"]
    assert len(bad_steps) == 2
    for bad in bad_steps:
        assert not bad["applied"]
        assert not math.isfinite(bad["norm"])
        assert bad["weights_difference"] == 0
        assert bad["average_difference"] == 0


@each_case
def test_the_average_is_a_plain_implementations(seen: dict[Case, dict[str, Any]], case: Case) -> None:
    """Over the whole float32 weights, after each step."""
    assert seen[case]["ema_errors"] == pytest.approx([0.0] * 6, abs=1e-6)


@each_case
def test_a_loaded_engine_goes_on_bit_for_bit(seen: dict[Case, dict[str, Any]], case: Case) -> None:
    mine = seen[case]
    assert mine["difference_before_loading"] > 1e-3
    assert mine["progress"] == {"step": SAVED_STEP}
    assert mine["resumed"] == {
        "losses": mine["losses"][SAVED_STEP:],
        "norms": mine["norms"][SAVED_STEP:],
        "weights_difference": 0,
        "average_difference": 0,
    }
    assert "frozen" in mine["refused"]


@each_case
def test_the_global_batch_decides_and_not_how_it_is_spread(seen: dict[Case, dict[str, Any]], case: Case) -> None:
    mine, reference = seen[case], seen[Case("zero0", case.precision, 1)]
    tolerance = TOLERANCE[case.precision]
    assert len(set(reference["losses"])) == len(reference["losses"])
    assert mine["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert mine["norms"] == pytest.approx(reference["norms"], rel=tolerance)


@each_move
def test_a_state_moves_to_any_number_of_ranks_and_any_engine(
    seen: dict[Case, dict[str, Any]], moved: dict[Move, dict[str, Any]], move: Move
) -> None:
    mine, precision = moved[move], move.source.precision
    # The state itself moves bit for bit; what follows differs as on other ranks from the start.
    assert mine["difference_before_loading"] > 1e-3
    assert mine["weights_difference"] == 0
    assert mine["average_difference"] == 0
    assert set(mine["piece_differences"].values()) == {0.0}, mine["piece_differences"]
    # Stage 0's loss scaler has no hysteresis to save.
    if precision != "fp16":
        assert mine["scalars"] == mine["saved_scalars"]
    assert mine["losses"] == pytest.approx(seen[move.source]["losses"][SAVED_STEP:], rel=TOLERANCE[precision])


def test_the_control_precisions_differ(seen: dict[Case, dict[str, Any]]) -> None:
    full, half = (seen[Case("zero0", precision, 1)]["losses"] for precision in ("no", "bf16"))
    assert full != pytest.approx(half, rel=1e-6)
