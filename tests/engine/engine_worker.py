"""Started on several ranks by test_engines.py: goes through engines and precisions in one launch.

    engine_worker.py <ds_configs> <folder> <name>[,<name>...]

A name is <engine>:<precision>, and an engine a file of <ds_configs> or one of FSDP. Rank 0 writes
<folder>/<world size>-ranks.json: the numbers that each case saw, by its name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobius_train.job import environment

launch = environment.prepare()  # before torch and DeepSpeed are imported

# ruff: noqa: E402
import torch
from deepspeed.accelerator import get_accelerator
from engine_settings import settings
from torch import Tensor, nn

from mobius_train.checkpoint.folders import folder_of
from mobius_train.checkpoint.resume import find, resume
from mobius_train.checkpoint.saver import Identity, Retention, Saver
from mobius_train.cli import run_rank
from mobius_train.config_sections import FsdpConfig
from mobius_train.engine.deepspeed import DeepSpeedEngine
from mobius_train.engine.ds_config import read_ds_json, resolve
from mobius_train.engine.fsdp import FsdpEngine
from mobius_train.engine.mesh import make_mesh, shard_size
from mobius_train.engine.protocol import Engine
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed

# DeepSpeed lets only CPUs with fp16 instructions use fp16; torch computes in it on any.
type(get_accelerator()).is_fp16_supported = lambda self: True

IDENTITY = Identity("seed: 0\n", 8, "hash", "source", {})
# From 2^16 the first steps would be those that the loss scaler skips.
SCALE_POWER = 8
FSDP = {
    "fsdp": FsdpConfig(initial_scale_power=SCALE_POWER),
    "fsdp_hybrid": FsdpConfig(
        sharding="hybrid", shard_size=2, reshard_after_forward=False, initial_scale_power=SCALE_POWER
    ),
    "fsdp_offload": FsdpConfig(cpu_offload=True, initial_scale_power=SCALE_POWER),
}
WIDTH, GLOBAL_BATCH, STEPS, BAD_STEP, SAVED_STEP, DECAY = 6, 8, 6, 2, 4, 0.9


class Layered(nn.Module):
    """Like the ring: takes a generator of features and a number; like a serial model: has frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.offset: Tensor
        self.register_buffer("offset", torch.full((WIDTH,), 0.1))

    def forward(self, stream: Iterator[Tensor], num_frames: int) -> Tensor:
        h: Tensor | None = None
        for layer, feature in zip(self.layers, stream, strict=True):
            offset = self.get_buffer("offset").to(feature.dtype)
            h = torch.tanh(layer(feature if h is None else self.frozen(h) + feature)) + offset
        assert h is not None
        return h * num_frames


def module(seed: int) -> Layered:
    """Frozen weights are the same for all seeds: they are in no checkpoint, so a resumed run brings its own."""
    torch.manual_seed(0)
    made = Layered()
    torch.manual_seed(seed)
    for layer in made.layers:
        layer.reset_parameters()  # type: ignore[operator]
    return made


def make(name: str, precision: Any, distributed: Distributed, seed: int) -> Engine:
    accumulation = 2
    chosen = settings(
        micro_batch_size=GLOBAL_BATCH // accumulation // distributed.world_size,
        gradient_accumulation_steps=accumulation,
        mixed_precision=precision,
        learning_rate=1e-2,
        adam_beta2=0.99,
        adam_weight_decay=0.01,
        max_grad_norm=0.5,
        use_ema=True,
        ema_decay=DECAY,
    )
    trained = module(seed)
    if name in FSDP:
        size = shard_size(FSDP[name], distributed.world_size, distributed.world_size)
        mesh = make_mesh(size, distributed.world_size, distributed.device)
        units = [[trained.layers[0]], [trained.layers[1], trained.frozen]]
        return FsdpEngine(trained, units, chosen, FSDP[name], mesh, distributed)
    ds_json = read_ds_json(Path(sys.argv[1]) / f"{name}.json")
    ds_json["fp16"] |= {"initial_scale_power": SCALE_POWER}
    return DeepSpeedEngine(trained, chosen, resolve(ds_json, chosen, distributed.world_size), distributed)


def step(engine: Engine, number: int, distributed: Distributed, bad: float | None = None) -> Any:
    """One optimizer step on the global batch of this number; `bad` stands in the last rank's last loss."""
    samples = torch.randn(2, GLOBAL_BATCH // 2, 3, WIDTH, generator=torch.Generator().manual_seed(number))
    per_rank = GLOBAL_BATCH // 2 // distributed.world_size
    total, report = 0.0, None
    for micro in range(2):
        assert report is None
        mine = samples[micro, distributed.rank * per_rank :][:per_rank].to(engine.dtype)
        loss = engine((mine[:, i] for i in range(3)), num_frames=2).float().square().mean()
        if bad is not None and micro == 1 and distributed.rank == distributed.world_size - 1:
            # Infinity added leaves the gradient finite, NaN multiplied does not.
            loss = loss + bad if bad == float("inf") else loss * bad
        engine.backward(loss)
        report = engine.step(1e-2 * (1 + number % 2))
        total += float(loss.detach()) / 2
    assert report is not None
    return distributed.mean({"loss": total})["loss"], report


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest of all elements; 0 if and only if they are equal, and NaN if one is NaN."""
    assert one.keys() == other.keys()
    return float(torch.stack([(one[name] - other[name]).abs().max() for name in one]).max())


def average(average: dict[str, Tensor], weights: dict[str, Tensor], update: int) -> dict[str, Tensor]:
    decay = min(DECAY, (1 + update) / (10 + update))
    return {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}


def case(name: str, precision: str, folder: Path, distributed: Distributed) -> dict[str, Any]:
    seen: dict[str, Any] = {"losses": [], "norms": [], "bad_steps": [], "ema_errors": []}
    # Ranks that start from other weights: rank 0's count.
    engine = make(name, precision, distributed, seed=distributed.rank)
    given = {n: p.detach().clone() for n, p in module(0).named_parameters() if p.requires_grad}
    seen["start_difference"] = difference(engine.weights(), given)
    plain = engine.weights()
    saver = Saver(folder, engine, IDENTITY, Retention(), distributed)
    for number in range(STEPS):
        if number == BAD_STEP:
            for bad in (float("nan"), float("inf")):
                weights, averaged = engine.weights(), engine.averaged_weights()
                _, report = step(engine, number, distributed, bad)
                seen["bad_steps"].append(
                    {
                        "applied": report.applied,
                        "norm": report.gradient_norm,
                        "weights_difference": difference(engine.weights(), weights),
                        "average_difference": difference(engine.averaged_weights(), averaged),
                    }
                )
        loss, report = step(engine, number, distributed)
        assert report.applied
        assert (report.loss_scale is None) == (precision != "fp16")
        seen["losses"].append(loss)
        seen["norms"].append(report.gradient_norm)
        plain = average(plain, engine.weights(), update=number + 1)
        seen["ema_errors"].append(difference(plain, engine.averaged_weights()))
        if number + 1 == SAVED_STEP:
            # Training goes on while it is written.
            saver.save({"step": number + 1})
        saver.poll()
    saver.wait()
    last, last_average = engine.weights(), engine.averaged_weights()
    seen["moved"] = difference(last, given)
    engine.close()

    engine = make(name, precision, distributed, seed=7)
    seen["difference_before_loading"] = difference(engine.weights(), last)
    saved = find(folder, "latest", distributed)
    assert saved == folder_of(folder, SAVED_STEP)
    seen["progress"] = resume(saved, engine, IDENTITY, distributed)
    resumed: dict[str, Any] = {"losses": [], "norms": []}
    for number in range(SAVED_STEP, STEPS):
        loss, report = step(engine, number, distributed)
        resumed["losses"].append(loss)
        resumed["norms"].append(report.gradient_norm)
    resumed["weights_difference"] = difference(engine.weights(), last)
    resumed["average_difference"] = difference(engine.averaged_weights(), last_average)
    seen["resumed"] = resumed
    try:
        resume(saved, engine, replace(IDENTITY, frozen_sha256="other"), distributed)
    except MobiusError as error:
        seen["refused"] = str(error)
    engine.close()
    return seen


def main() -> None:
    folder, names = Path(sys.argv[2]), sys.argv[3].split(",")
    distributed = Distributed(launch)
    seen = {}
    for pair in names:
        name, precision = pair.split(":")
        seen[pair] = case(name, precision, folder / f"{distributed.world_size}-{name}-{precision}", distributed)
    if distributed.is_main:
        (folder / f"{distributed.world_size}-ranks.json").write_text(json.dumps(seen))
    distributed.close()


if __name__ == "__main__":
    run_rank(main)
