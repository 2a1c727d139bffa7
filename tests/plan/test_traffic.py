"""The formula against what collectives carry on two gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch
from recipes import DS_CONFIGS

from mobius_train.plan.traffic import Traffic, traffic

# Flags and norms.
SMALL = 100  # bytes
RELEASE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("precision", "accumulation", "options"), [("bf16", 1, {}), ("no", 3, {}), ("bf16", 2, RELEASE)]
)
def test_what_is_sent_is_what_the_formula_says(precision: str, accumulation: int, options: dict[str, int]) -> None:
    worker = Path(__file__).parent / "traffic_worker.py"
    arguments = (precision, str(accumulation), str(DS_CONFIGS), json.dumps(options))
    result = launch(2, worker, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    counted = json.loads(result.stdout.strip().splitlines()[-1])
    value_bytes = 2 if precision == "bf16" else 4
    for stage in range(4):
        expected = traffic(
            counted["parameters"],
            stage,
            accumulation=accumulation,
            value_bytes=value_bytes,
            gathers=2 if options else 1,
        )
        found = counted["bytes"][str(stage)]
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
