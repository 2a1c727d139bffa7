from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import LAUNCHER_VARIABLES
from recipes import DS_CONFIGS, Run, recipe, write
from tiny import save_clips, save_pipeline

# Nothing here may reach for a model hub, and models this small gain nothing from threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of the emoji layout: unet/, vae/, scheduler/."""
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten GIFs of 4 frames, 32 px, with captions."""
    return save_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo group of this process alone, for all runs in it: DeepSpeed takes only one in the life of a process."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process_group: None
) -> Run:
    """Train a recipe with changes in this process; returns its output folder."""
    from mobius_train.config import load
    from mobius_train.engine.spread import spread_of
    from mobius_train.job import environment
    from mobius_train.run import dry_run, train

    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def start(name: str = "out", ds_config: str | None = "zero2", dry: bool = False, **changes: Any) -> Path:
        monkeypatch.delenv("MASTER_PORT", raising=False)
        values = recipe(tiny_pipeline, clips_folder, tmp_path / name, **changes)
        config = load(write(tmp_path / f"{name}.yaml", values))
        ds_path = None if ds_config is None else DS_CONFIGS / f"{ds_config}.json"
        engine: Any = "fsdp" if ds_config is None else "deepspeed"
        (dry_run if dry else train)(config, spread_of(engine, ds_path, environment.prepare()))
        return tmp_path / name

    return start
