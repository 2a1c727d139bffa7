"""The training clips of a recipe, opened as by a run of one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from recipes import recipe, write

from mobius_train.assembly.open_data import open_data
from mobius_train.config import RunConfig, load
from mobius_train.data.clips import ClipDataset
from mobius_train.job.distributed import Distributed

ALONE = SimpleNamespace(rank=0, world_size=1, is_main=True, on_main=lambda act: act(), divide=lambda act: [act(0, 1)])


def configured(folder: Path, **data: Any) -> RunConfig:
    """A recipe in `folder` with this data: 4 frames of 16 pixels if nothing else is given, none held out."""
    data = {"validation": None, "num_frames": 4, "resolution": 16} | data
    return load(write(folder / "recipe.yaml", recipe(folder, folder, folder / "out", data=data)))


def opened_as(config: RunConfig) -> ClipDataset:
    return open_data(config, cast(Distributed, ALONE))[0]


def opened(folder: Path, **data: Any) -> ClipDataset:
    return opened_as(configured(folder, **data))
