"""What contradicts itself is refused by name, before anything is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes import DS_CONFIGS, recipe, start, write

from mobius_train.config import FsdpConfig
from mobius_train.engine.choose import choose_engine
from mobius_train.engine.mesh import shard_size
from mobius_train.engine.optimizers import check_optimizer
from mobius_train.engine.settings import EngineSettings
from mobius_train.errors import MobiusError
from mobius_train.job.environment import Launch

SETTINGS = EngineSettings(
    micro_batch_size=1,
    gradient_accumulation_steps=1,
    mixed_precision="no",
    optimizer="adamw",
    learning_rate=1e-3,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_epsilon=1e-8,
    adam_weight_decay=0.0,
    max_grad_norm=1.0,
    seed=0,
    use_ema=False,
    ema_decay=0.9,
)
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
    alone = Launch(0, 0, 1, 1)
    choose_engine(SETTINGS, FsdpConfig(), DS_CONFIGS / "zero2.json", alone)
    with pytest.raises(MobiusError, match="fsdp settings, which do nothing under --engine deepspeed"):
        choose_engine(SETTINGS, FsdpConfig(cpu_offload=True), DS_CONFIGS / "zero2.json", alone)


def test_a_deepspeed_configuration_is_not_for_fsdp(tiny_pipeline: Path, clips_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out"))
    result = start(path, "--engine", "fsdp", launcher="python")
    assert result.returncode == 1
    assert "zero2.json is for --engine deepspeed, and --engine is fsdp" in result.stderr


def test_8_bit_moments_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer(SETTINGS, offloaded=True)
    with pytest.raises(MobiusError, match="pip install 'bitsandbytes"):
        check_optimizer(EIGHT_BIT, offloaded=False)


def test_8_bit_moments_need_a_gpu_and_stay_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MobiusError, match="needs a CUDA device"):
        check_optimizer(EIGHT_BIT, offloaded=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_optimizer(EIGHT_BIT, offloaded=False)
    with pytest.raises(MobiusError, match="optimizer is offloaded"):
        check_optimizer(EIGHT_BIT, offloaded=True)
