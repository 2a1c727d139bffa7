"""Checks of all stages before the first step: a stage that cannot train fails now, not after days."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from mobius_train.assembly.model_configs import ModelConfigs, find_configs
from mobius_train.assembly.open_data import open_data
from mobius_train.assembly.options import check_device, without_gpu_options
from mobius_train.assembly.parts import parts_of
from mobius_train.assembly.weights import Random
from mobius_train.config import RunConfig
from mobius_train.engine.choose import choose_engine
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.preflight import preflight
from mobius_train.run import check_reports
from mobius_train.stages.recipe import StageRecipe, Stages

META = torch.device("meta")


def check_stages(stages: Stages, spread: Spread, distributed: Distributed, done: int = 0) -> None:
    """Check engine, models, data and memory of every stage that will be trained. Collective.

    The models are built without weights, each from the one before it. On GPUs the memory is planned.

    Args:
        done: number of the first stages that are finished; their data may be gone.

    Raises:
        MobiusError: the message names the stage.
    """
    for stage in stages.recipes[done:]:
        with naming(stage):
            choose_engine(stage.config, spread)
            distributed.on_main(partial(check_reports, stage.config))
            check_device(stage.config, distributed.device)
    distributed.on_main(lambda: check_models(stages))
    for stage in stages.recipes[done:]:
        with naming(stage):
            if distributed.is_main:
                print(f"checking {stage}", flush=True)
            line = preflight(stage.config, spread, stage.config.output_dir.parent, distributed).line
            if distributed.is_main:
                print(line, flush=True)
            distributed.watch.enter("start", f"opening the data of {stage}")
            open_data(stage.config, distributed)


@contextmanager
def naming(stage: StageRecipe) -> Iterator[None]:
    """Context whose errors name the stage."""
    try:
        yield
    except MobiusError as error:
        raise MobiusError(f"{stage}: {error}") from error


def check_models(stages: Stages) -> None:
    """Build the models of all stages without weights, each from the one before it.

    Raises:
        MobiusError: a model does not fit its stage, or an optimizer's state the parameters that the stage trains.
    """
    model: nn.Module | None = None
    trained: dict[str, list[int]] = {}
    for stage in stages.recipes:
        with naming(stage):
            config = without_gpu_options(stage.config)
            parts = parts_of(config, _Following(find_configs(config), model), META)
            module = parts.denoiser.trained
            names = {name: list(p.shape) for name, p in module.named_parameters() if p.requires_grad}
            if stage.optimizer_state == "kept" and names != trained:
                raise MobiusError(
                    "optimizer_state=kept, but the stage does not train the same parameters as the stage before: use"
                    " fresh"
                )
            model, trained = parts.denoiser.with_trained(module), names


class _Following(Random):
    """New models, except for that of the stage before."""

    def __init__(self, configs: ModelConfigs, model: nn.Module | None) -> None:
        super().__init__(configs, META)
        self._model = model

    def image_or_video_model(self, config: RunConfig) -> nn.Module:
        return super().image_or_video_model(config) if self._model is None else self._model
