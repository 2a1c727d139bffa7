"""What a stage starts from: the model, the weights and the optimizer's state of the stage before.

The structure and the frozen weights come from that stage's final/, whose trained weights are in the dtype that the
stage computed in. So the trained weights come from its last checkpoint, in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobius_train.assembly.load_scheduler import load_scheduler
from mobius_train.assembly.weights import Pretrained
from mobius_train.checkpoint.folders import pointed
from mobius_train.checkpoint.read import Checkpoint
from mobius_train.checkpoint.resume import find
from mobius_train.config import RunConfig
from mobius_train.engine.protocol import Engine, Piece
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.models import build_denoiser
from mobius_train.run_files import LATEST
from mobius_train.stages.recipe import StageRecipe
from mobius_train.stages.record import FINAL


def config_after(stage: StageRecipe, before: StageRecipe | None, output_dir: Path) -> RunConfig:
    """Return the recipe that trains a stage, with the final/ of the stage before as its pretrained model.

    The noise schedule stays that of the base recipe: a final/ has the schedule as its own stage changed it.

    Raises:
        MobiusError: the base recipe's scheduler cannot be read.
    """
    changes: dict[str, Any] = {"output_dir": output_dir / stage.folder}
    if before is not None:
        scheduler = load_scheduler(stage.config.scheduler_config, stage.config.pretrained_model_name_or_path)
        kept = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
        changes |= {
            "pretrained_model_name_or_path": str(output_dir / before.folder / FINAL),
            "unet_config": None,
            "scheduler_config": kept | {"_class_name": type(scheduler).__name__},
        }
    return stage.config.model_copy(update=changes)


def last_checkpoint(stage: StageRecipe, output_dir: Path, distributed: Distributed) -> Checkpoint:
    """Open the checkpoint of the end of a stage. Collective.

    Raises:
        MobiusError: it is missing or damaged.
    """
    folder = output_dir / stage.folder
    # By its name: "latest" would pass over a damaged one.
    found = find(folder, distributed.on_main(lambda: pointed(folder)) or LATEST, distributed)
    assert found is not None
    return Checkpoint(found)


class AfterStage(Pretrained):
    """The pretrained models of a stage's recipe, with float32 trained weights of the stage before.

    Args:
        before: the recipe of the stage before.
        checkpoint: its last.
        averaged: take the moving average of the weights.
    """

    def __init__(self, before: RunConfig, checkpoint: Checkpoint, averaged: bool) -> None:
        self._before, self._checkpoint, self._averaged = before, checkpoint, averaged

    def image_or_video_model(self, config: RunConfig) -> nn.Module:
        model = super().image_or_video_model(config)
        assert self._before.stage != "autoencoder"
        trained = build_denoiser(model, self._before.stage, self._before.mode).trained
        parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        if {name: list(p.shape) for name, p in parameters.items()} != self._checkpoint.state.contents.trained:
            raise MobiusError(
                f"{config.pretrained_model_name_or_path} and {self._checkpoint.folder} have different trained"
                " parameters, so they are not of the same stage: restore them"
            )
        with torch.no_grad():
            for name, tensor in self._checkpoint.weights(self._averaged):
                parameters[name].copy_(tensor)
        return model


def keep_optimizer_state(engine: Engine, checkpoint: Checkpoint, averaged: bool) -> None:
    """Give an engine Adam's moments and step count of the stage before. All ranks call it.

    Weights and moving average are those that the stage starts from, and the loss scale is new.
    """
    start = "average" if averaged else "weights"

    def fill(name: str, piece: Piece) -> None:
        kind, _, parameter = name.partition("/")
        checkpoint.fill(f"{start}/{parameter}" if kind in ("weights", "average") else name, piece)

    engine.restore(fill, engine.scalars() | {"adam_step": checkpoint.state.scalars["adam_step"]})
