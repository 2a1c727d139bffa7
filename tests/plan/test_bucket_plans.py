"""The planner and buckets: the largest is what is planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import recipe, write

from mobius_train.config import load
from mobius_train.engine.spread import Spread
from mobius_train.plan import Plan, Planner, find_gpu
from mobius_train.plan.advice import CHANGES
from mobius_train.plan.largest import QUANTITIES

pytestmark = pytest.mark.slow

LARGE = {"num_frames": 8, "width": 64, "height": 64}
SMALL = {"num_frames": 8, "width": 32, "height": 64}


@pytest.mark.parametrize("stage", ["text-to-video", "autoencoder"])
def test_the_largest_bucket_is_planned(tiny_pipeline: Path, tmp_path: Path, stage: str) -> None:
    planner = Planner()

    def planned(**data: object) -> Plan:
        values = recipe(tiny_pipeline, tmp_path, tmp_path / "out", stage=stage, validation={"prompts": []})
        values["data"] |= {"validation": None} | data
        return planner.plan(load(write(tmp_path / "recipe.yaml", values)), Spread.over(1))

    one = planned(num_frames=8, resolution=64)
    assert planned(buckets=[SMALL, LARGE, {"num_frames": 1, "width": 64, "height": 64}]).parts == one.parts
    # The control: without it less is planned, whichever way it lies.
    wide, tall = (planned(buckets=[SMALL | sides]) for sides in ({}, {"width": 64, "height": 32}))
    assert wide.parts == tall.parts
    assert sum(wide.saved.values()) < 0.7 * sum(one.saved.values())


def test_buckets_say_what_else_would_be_tried(tiny_pipeline: Path, tmp_path: Path) -> None:
    values = recipe(tiny_pipeline, tmp_path, tmp_path / "out", data={"resolution": 128})

    def tried(buckets: list[dict[str, int]] | None) -> tuple[set[str], set[str]]:
        """The quantities whose largest value is sought, and the changes that are tried to make it fit."""
        values["data"]["buckets"] = buckets
        config = load(write(tmp_path / "recipe.yaml", values))
        changes = {one.setting for one in CHANGES if one.apply(config, Spread.over(1), find_gpu("V100-16"))}
        return {one.name for one in QUANTITIES if one.applies(config)}, changes

    (quantities, changes), (all_quantities, all_changes) = tried([LARGE]), tried(None)
    assert quantities == {"train_batch_size"}
    # The control: without buckets the clips' sizes are tried too.
    assert all_quantities - quantities == {"data.num_frames", "data.resolution"}
    assert all_changes - changes == {"half of data.resolution"}
