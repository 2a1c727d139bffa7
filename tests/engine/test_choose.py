"""What contradicts itself is refused by name, before anything is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_settings import settings
from recipes import DS_CONFIGS, recipe, start, write

from mobius_train.config import RunConfig
from mobius_train.config_sections import FsdpConfig
from mobius_train.engine.choose import choose_engine
from mobius_train.engine.mesh import shard_size
from mobius_train.engine.optimizers import check_offload, check_optimizer
from mobius_train.engine.spread import Spread, spread_of
from mobius_train.errors import MobiusError
from mobius_train.job.environment import Launch


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": "x"}, "output_dir": "y", "max_train_steps": 1} | changes)


SETTINGS = settings()
EIGHT_BIT = replace(SETTINGS, optimizer="adamw_8bit")


@pytest.mark.parametrize(
    ("fsdp", "world_size", "local_world_size", "size"),
    [
        (FsdpConfig(), 1, 1, 1),
        (FsdpConfig(), 8, 4, 8),
        (FsdpConfig(sharding="hybrid"), 8, 4, 4),
        (FsdpConfig(sharding="hybrid", shard_size=2), 8, 4, 2),
    ],
)
def test_ranks_that_share_a_parameter(fsdp: FsdpConfig, world_size: int, local_world_size: int, size: int) -> None:
    assert shard_size(fsdp, world_size, local_world_size) == size


@pytest.mark.parametrize(
    ("fsdp", "world_size", "message"),
    [
        (FsdpConfig(shard_size=2), 4, r"fsdp\.shard_size=2.*fsdp\.sharding=full"),
        (FsdpConfig(sharding="hybrid", shard_size=3), 4, r"fsdp\.sharding=hybrid.*shard_size=3.*\[2\]"),
        (FsdpConfig(sharding="hybrid", shard_size=4), 4, r"shard_size=4.*\[2\]"),
        (FsdpConfig(sharding="hybrid"), 4, r"fsdp\.sharding=hybrid.*\[2\]"),
        (FsdpConfig(sharding="hybrid", shard_size=2), 2, r"fsdp\.sharding=hybrid.*fsdp\.sharding=full"),
        (FsdpConfig(sharding="hybrid", shard_size=2), 1, r"fsdp\.sharding=hybrid.*fsdp\.sharding=full"),
    ],
)
def test_a_sharding_that_the_ranks_do_not_allow(fsdp: FsdpConfig, world_size: int, message: str) -> None:
    with pytest.raises(MobiusError, match=message):
        shard_size(fsdp, world_size, world_size)


def test_fsdp_settings_do_nothing_under_deepspeed() -> None:
    spread = spread_of("deepspeed", DS_CONFIGS / "zero2.json", Launch(0, 0, 1, 1))
    choose_engine(config(), spread)
    with pytest.raises(MobiusError, match=r"fsdp.*deepspeed"):
        choose_engine(config(fsdp={"cpu_offload": True}), spread)


def test_a_hybrid_of_two_nodes_shards_within_each() -> None:
    hybrid = config(fsdp={"sharding": "hybrid"})
    two_nodes = Spread(Launch(rank=9, local_rank=1, world_size=16, local_world_size=8), "fsdp")
    two_nodes.check(hybrid)
    assert two_nodes.shard_size(hybrid) == 8
    # The control: on one node there is nothing to replicate over.
    with pytest.raises(MobiusError, match=r"fsdp\.sharding=hybrid"):
        Spread.over(8, "fsdp").check(hybrid)


@pytest.mark.parametrize(("ranks", "per_node"), [(0, None), (8, 3), (4, 8), (8, 0)])
def test_a_spread_that_cannot_be(ranks: int, per_node: int | None) -> None:
    with pytest.raises(MobiusError, match=rf"{ranks} rank"):
        Spread.over(ranks, ranks_per_node=per_node)


@pytest.mark.distributed
def test_a_deepspeed_configuration_is_not_for_fsdp(tiny_pipeline: Path, clips_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out"))
    result = start(path, "--engine", "fsdp", launcher="ranks")
    assert result.returncode == 1
    assert "zero2.json" in result.stderr
    assert "--engine" in result.stderr


def test_8_bit_moments_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer(SETTINGS)
    with pytest.raises(MobiusError, match=r"optimizer=adamw_8bit.*pip install"):
        check_optimizer(EIGHT_BIT)


def test_8_bit_moments_need_a_gpu_and_stay_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MobiusError, match=r"optimizer=adamw_8bit.*CUDA"):
        check_optimizer(EIGHT_BIT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_optimizer(EIGHT_BIT)
    with pytest.raises(MobiusError, match=r"optimizer=adamw_8bit.*offload"):
        check_offload("adamw_8bit", offloaded=True)
