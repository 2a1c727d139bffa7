"""The formula against what collectives carry on two gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import launch
from recipes import DS_CONFIGS

from mobius_train.plan.traffic import Traffic, traffic

# Flags and norms.
SMALL = 100  # bytes
RELEASE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


CASES: list[tuple[str, int, dict[str, int]]] = [("bf16", 1, {}), ("no", 3, {}), ("bf16", 2, RELEASE)]


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """The number of parameters, and the bytes of each case by stage and kind."""
    worker = Path(__file__).parent / "traffic_worker.py"
    result = launch(2, worker, str(DS_CONFIGS), json.dumps(CASES))
    assert result.returncode == 0, result.stderr[-3000:]
    seen: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize("case", range(len(CASES)), ids=["bf16", "accumulated in fp32", "gathered twice"])
def test_what_is_sent_is_what_the_formula_says(counted: dict[str, Any], case: int) -> None:
    precision, accumulation, options = CASES[case]
    assert list(counted["bytes"][case]) == (["3"] if options else list("0123"))
    for stage, found in counted["bytes"][case].items():
        expected = traffic(
            counted["parameters"],
            int(stage),
            accumulation=accumulation,
            value_bytes=2 if precision == "bf16" else 4,
            gathers=2 if options else 1,
        )
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            assert found.pop(kind.replace("_", "-"), 0) == pytest.approx(getattr(expected, kind), abs=SMALL), (
                stage,
                kind,
            )
        assert sum(found.values()) <= SMALL, (stage, found)


def test_a_ring_algorithm_sends_twice_the_share_of_the_others_in_an_all_reduce() -> None:
    assert Traffic(all_reduce=100).sent(4) == 150
    assert Traffic(all_gather=100, reduce_scatter=100).sent(4) == 150
    assert Traffic(all_reduce=100).sent(1) == 0
