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


def planned(pipeline: Path, folder: Path, **changes: Any) -> Plan:
    values = recipe(pipeline, folder, folder / "out", validation={"prompts": []}, **changes)
    values["data"]["validation"] = None
    return Planner().plan(load(write(folder / "recipe.yaml", values)), Spread.over(1))


def test_a_micro_batch_that_is_ahead_is_in_every_phase(tiny_pipeline: Path, tmp_path: Path) -> None:
    plain = planned(tiny_pipeline, tmp_path)
    ahead = planned(tiny_pipeline, tmp_path, frozen_ahead=True)
    more = ahead.parts[AHEAD]
    assert AHEAD not in plain.parts
    assert ahead.flops == plain.flops
    for phase in ("encoding", "optimizer's step"):
        assert ahead.phases[phase] - plain.phases[phase] == more
    # The features of the micro-batch in work are all there when its ring begins.
    assert ahead.phases["forward and backward"] - plain.phases["forward and backward"] >= more
    double = planned(tiny_pipeline, tmp_path, frozen_ahead=True, train_batch_size=4)
    assert double.parts[AHEAD] == pytest.approx(2 * more, rel=0.05)


def test_without_a_ring_only_what_the_tail_needs_is_held(tiny_pipeline: Path, tmp_path: Path) -> None:
    tail = {"ring_width": 0.0, "fusion_depth": 1, "tail_temporal_layers": True}
    held = [planned(tiny_pipeline, tmp_path, frozen_ahead=True, **shape).parts[AHEAD] for shape in ({}, tail)]
    assert 0 < held[1] < held[0]
