"""The planner counts the frozen branch that runs ahead in every phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes import recipe, write

from mobius_train.config import load
from mobius_train.engine.spread import Spread
from mobius_train.plan import Plan, Planner
from mobius_train.plan.planner import AHEAD

pytestmark = pytest.mark.slow


def test_a_micro_batch_that_is_ahead_is_in_every_phase(tiny_pipeline: Path, tmp_path: Path) -> None:
    def planned(**changes: Any) -> Plan:
        values = recipe(tiny_pipeline, tmp_path, tmp_path / "out", validation={"prompts": []}, **changes)
        values["data"]["validation"] = None
        return Planner().plan(load(write(tmp_path / "recipe.yaml", values)), Spread.over(1))

    plain, ahead = planned(), planned(frozen_ahead=True)
    more = ahead.parts[AHEAD]
    assert AHEAD not in plain.parts
    assert ahead.flops == plain.flops
    for phase in ("encoding", "optimizer's step"):
        assert ahead.phases[phase] - plain.phases[phase] == more
    # The features of the micro-batch in work are all there when its ring begins.
    assert ahead.phases["forward and backward"] - plain.phases["forward and backward"] >= more
    # Without a ring only what the tail needs is held.
    tail = planned(frozen_ahead=True, ring_width=0.0, fusion_depth=1, tail_temporal_layers=True)
    assert 0 < tail.parts[AHEAD] < more
