"""Weights & Biases. Its client reads WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY and so on by itself."""

from __future__ import annotations

from collections.abc import Mapping

import wandb

from mobius_train.job.environment import tracker_project
from mobius_train.metrics.trackers.tracker import About, Outcome, Sample

# Seconds for uploads at the end. What is not uploaded by then stays in logs/wandb, for `wandb sync`.
FINISH = 50


class WeightsAndBiases:
    """A resumed run goes on in the same run of W&B. Steps that are taken again appear twice there."""

    def __init__(self, about: About, known: str | None = None) -> None:
        about.logs.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=tracker_project("WANDB_PROJECT"),
            name=about.name,
            id=known,
            resume=None if known is None else "allow",
            dir=about.logs,
            config=dict(about.recipe),
            allow_val_change=True,
            notes=about.overview,
            # A run that was given up before, such as that of an earlier stage, is left alone.
            reinit="create_new",
            settings=wandb.Settings(console="off", finish_timeout=FINISH),
        )
        self.identity = str(self._run.id)
        # W&B's own step only grows, so it would refuse steps that a resumed run takes again.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def samples(self, step: int, samples: list[Sample]) -> None:
        self._run.log({"step": step} | {f"samples/{sample.name}": _media(sample) for sample in samples})

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=int(outcome == "failed"))


def _media(sample: Sample) -> wandb.Video | wandb.Image:
    if sample.path.suffix == ".gif":
        return wandb.Video(str(sample.path), caption=sample.caption, format="gif")
    return wandb.Image(str(sample.path), caption=sample.caption)
