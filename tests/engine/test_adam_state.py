"""8-bit moments are saved as float32 and taken over, under each engine; bitsandbytes' CPU kernels stand for a GPU's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from engine_settings import settings
from recipes import DS_CONFIGS
from torch import Tensor, nn

from mobius_train.config_sections import FsdpConfig
from mobius_train.engine.deepspeed import DeepSpeedEngine
from mobius_train.engine.ds_config import resolve
from mobius_train.engine.fsdp import FsdpEngine
from mobius_train.engine.mesh import make_mesh
from mobius_train.engine.protocol import Engine, Piece
from mobius_train.job import environment
from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import Launch

pytest.importorskip("bitsandbytes", minversion="0.50", reason="needs bitsandbytes 0.50, whose kernels run on CPUs too")

pytestmark = pytest.mark.usefixtures("process_group", "launched")
ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    environment.prepare()


def _engine(name: str, optimizer: Any) -> Engine:
    chosen = settings(micro_batch_size=2, optimizer=optimizer, learning_rate=1e-2, adam_weight_decay=0.01)
    distributed = Distributed(Launch(0, 0, 1, 1))
    torch.manual_seed(0)
    # The first weight has two blocks of 8-bit moments and a bit; what is smaller than 4096 elements stays float32.
    module = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 8))
    if name == "fsdp":
        mesh = make_mesh(1, 1, distributed.device)
        return FsdpEngine(module, [[module[0]]], chosen, FsdpConfig(), mesh, distributed)
    ds_json = json.loads((DS_CONFIGS / f"{name}.json").read_text())
    return DeepSpeedEngine(module, chosen, resolve(ds_json, chosen, 1), distributed)


def _steps(engine: Engine, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(number))
        loss = (engine(x) - 1).square().mean()
        engine.backward(loss)
        engine.step(1e-2)
        losses.append(float(loss.detach()))
    return losses


def _saved(engine: Engine) -> dict[str, Tensor]:
    return {name: piece.data.clone() for name, piece in engine.pieces().items()}


@pytest.mark.parametrize("name", ENGINES)
def test_8_bit_moments_are_saved_and_taken_over(name: str) -> None:
    engine = _engine(name, "adamw_8bit")
    losses = _steps(engine, range(8))
    assert losses == pytest.approx(_steps(_engine(name, "adamw"), range(8)), rel=0.05)
    saved, scalars = _saved(engine), engine.scalars()
    assert scalars["adam_step"] == 8
    further = _steps(engine, range(8, 12))

    def fill(name: str, piece: Piece) -> None:
        piece.data.copy_(saved[name])

    other = _engine(name, "adamw_8bit")
    other.restore(fill, scalars)
    restored = _saved(other)
    for tensor, before in saved.items():
        if tensor.startswith("weights/"):
            assert torch.equal(restored[tensor], before), tensor
        else:
            # A code away at most, on a scale of 256 from the largest of a block.
            assert (restored[tensor] - before).abs().max() <= before.abs().max() / 50, tensor
    assert other.scalars() == scalars
    assert _steps(other, range(8, 12)) == pytest.approx(further, rel=1e-2)


@pytest.mark.parametrize("name", ENGINES)
def test_the_control_float32_moments_come_back_to_the_last_bit(name: str) -> None:
    engine = _engine(name, "adamw")
    _steps(engine, range(4))
    saved, scalars = _saved(engine), engine.scalars()
    further = _steps(engine, range(4, 6))
    other = _engine(name, "adamw")

    def fill(name: str, piece: Piece) -> None:
        piece.data.copy_(saved[name])

    other.restore(fill, scalars)
    assert _steps(other, range(4, 6)) == further
