"""Division of a recipe's stages into passes over the parts. Each pass but the last ends with a global decision."""

from __future__ import annotations

from typing import NamedTuple

from mobius_train.prepare.recipe import PrepareConfig
from mobius_train.prepare.stages.stage import GlobalStage, Stage


class Pass(NamedTuple):
    """stages: run on each part. decision: made after all parts; None in the last pass, which writes the shards."""

    number: int
    stages: list[Stage]
    decision: GlobalStage | None


def passes(config: PrepareConfig) -> list[Pass]:
    """The passes of a recipe in order."""
    complete: list[Pass] = []
    stages: list[Stage] = []
    for stage in config.stages:
        stages.append(stage)
        if isinstance(stage, GlobalStage):
            complete.append(Pass(len(complete), stages, stage))
            stages = []
    return [*complete, Pass(len(complete), stages, None)]
