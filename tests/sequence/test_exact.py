"""Ranks that share clips compute the gradients of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import launch

ALONE = "paper:keep:control"
UNETS = ("paper", "half, tail", "tail alone", "trained tail", "serial")
CASES = (
    *(f"{model}:keep:float64" for model in UNETS),
    *(f"half, tail:{treatment}:float64" for treatment in ("recompute", "selective", "offload")),
    "paper:keep:float32",
    *(f"{model}:keep:float64" for model in ("sd3", "sd35, half, tail", "pixart", "vchitect")),
    *(f"{model}:recompute:float64" for model in ("sd3", "vchitect")),
    ALONE,
)


def compared(folder: Path, ranks: int, size: int, cases: tuple[str, ...]) -> dict[str, Any]:
    worker = Path(__file__).parent / "sequence_worker.py"
    finished = launch(ranks, worker, str(folder), str(size), ";".join(cases))
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return json.loads((folder / f"{size}.json").read_text())


def tolerance(case: str) -> float:
    # The normalised queries and keys of a transformer's ring, and what it adds up, are float32 in any case.
    return 1e-12 if case.startswith(UNETS) and case.endswith("float64") else 1e-6


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "size", "cases"),
    [
        pytest.param(2, 2, CASES, id="one group of two"),
        # Shares differ: 10 frames and 4 positions in the deepest level, over 3 ranks.
        pytest.param(3, 3, ("half, tail:keep:float64", "sd35, half, tail:keep:float64", ALONE), id="uneven"),
        pytest.param(4, 2, ("paper:recompute:float64", "sd3:keep:float64"), id="two groups"),
    ],
)
def test_the_mean_of_the_gradients_is_that_of_one_rank(
    tmp_path: Path, ranks: int, size: int, cases: tuple[str, ...]
) -> None:
    seen = compared(tmp_path, ranks, size, cases)
    alone = seen.pop(ALONE, None)
    assert {case: found["apart"] for case, found in seen.items() if not found["apart"] < tolerance(case)} == {}
    assert len(seen) == len(cases) - (alone is not None)
    assert {case: found for case, found in seen.items() if not found["counted"] == found["planned"] > 1e4} == {}
    # Without shared norms it is another model.
    assert alone is None or alone["apart"] > 1e-3
