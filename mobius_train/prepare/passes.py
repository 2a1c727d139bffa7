"""The stages of a recipe as passes over the parts: each but the last ends with a decision over all clips."""

from __future__ import annotations

from typing import NamedTuple

from mobius_train.prepare.recipe import PrepareConfig
from mobius_train.prepare.stages.stage import GlobalStage, Stage


class Pass(NamedTuple):
    """stages: for each part by itself. decision: taken when all parts are through; the last writes shards."""

    number: int
    stages: list[Stage]
    decision: GlobalStage | None


def passes(config: PrepareConfig) -> list[Pass]:
    """In their order."""
    found: list[Pass] = []
    stages: list[Stage] = []
    for stage in config.stages:
        stages.append(stage)
        if isinstance(stage, GlobalStage):
            found.append(Pass(len(found), stages, stage))
            stages = []
    return [*found, Pass(len(found), stages, None)]
