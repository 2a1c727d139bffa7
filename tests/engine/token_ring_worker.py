"""Started on several ranks by test_token_ring_engines.py: trains a ring beside a small transformer, or a serial model.

    token_ring_worker.py <ds_configs> <folder> <mode>:<engine>[,<mode>:<engine>...]

Rank 0 writes <folder>/<world size>-rings.json: how far each engine's weights are from those of plain AdamW on the whole
batch, and for each mode how far these moved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mobius_train.job import environment

launch = environment.prepare()  # before torch and DeepSpeed are imported

# ruff: noqa: E402
import torch
from engine_settings import settings
from sd3 import SD3Batch, sd3_batch, tiny_sd3
from torch import Tensor

from mobius_train.cli import run_rank
from mobius_train.config_sections import FsdpConfig
from mobius_train.engine.deepspeed import DeepSpeedEngine
from mobius_train.engine.ds_config import read_ds_json, resolve
from mobius_train.engine.fsdp import FsdpEngine
from mobius_train.engine.mesh import make_mesh, shard_size
from mobius_train.engine.protocol import Engine
from mobius_train.job.distributed import Distributed
from mobius_train.models import build_denoiser
from mobius_train.models.recompute import LayerMemory

# At the usual epsilon Adam divides rounding errors of gradients near 0 by numbers near 0.
STEPS, CLIPS, RATE, EPSILON = 3, 4, 1e-2, 1e-3
# Behind the fusion there are temporal layers and trained blocks, and every layer has parameters of its own.
SHAPE = {
    "ring_width": 0.5,
    "ring_every": 1,
    "fusion_depth": 1,
    "tail_temporal_layers": True,
    "trained_tail": True,
    "context_latents": 2,
}


def model(mode: Any) -> Any:
    torch.manual_seed(0)
    made = build_denoiser(tiny_sd3("sd35" if mode == "parallel" else "sd3"), "text-to-video", mode, SHAPE)
    made.set_memory(LayerMemory(True, gradient_checkpointing_kept=0.5, recompute_activations=True))
    return made


def weights_of(made: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.trained.named_parameters() if p.requires_grad}


def part(batch: SD3Batch, rank: int, ranks: int) -> SD3Batch:
    return SD3Batch(*(tensor.tensor_split(ranks)[rank] for tensor in batch))


def batch_of(step: int, made: Any) -> SD3Batch:
    batch = sd3_batch(made.image_model, clips=CLIPS)
    generator = torch.Generator().manual_seed(step)
    return batch._replace(sample=torch.randn(batch.sample.shape, generator=generator))


def plain(mode: str) -> dict[str, Tensor]:
    made = model(mode)
    parameters = [p for p in made.trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=EPSILON, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        made.predict(*batch_of(step, made).given()).square().mean().backward()
        optimizer.step()
    return weights_of(made)


def trained(mode: str, name: str, distributed: Distributed) -> dict[str, Tensor]:
    made, ranks = model(mode), distributed.world_size
    chosen = settings(micro_batch_size=CLIPS // ranks, learning_rate=RATE, adam_epsilon=EPSILON, max_grad_norm=0.0)
    engine: Engine
    if name == "fsdp":
        fsdp = FsdpConfig()
        mesh = make_mesh(shard_size(fsdp, ranks, ranks), ranks, distributed.device)
        engine = FsdpEngine(made.trained, made.units(), chosen, fsdp, mesh, distributed)
    else:
        ds_json = resolve(read_ds_json(Path(sys.argv[1]) / f"{name}.json"), chosen, ranks)
        engine = DeepSpeedEngine(made.trained, chosen, ds_json, distributed)
    for step in range(STEPS):
        mine = part(batch_of(step, made), distributed.rank, ranks)
        engine.backward(made.predict(*mine.given(), trained=engine).square().mean())
        engine.step(RATE)
    weights = engine.weights()
    engine.close()
    return weights


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return float(torch.stack([(one[name] - other[name]).abs().max() for name in one]).max())


def main() -> None:
    distributed = Distributed(launch)
    cases = [case.split(":") for case in sys.argv[3].split(",")]
    expected = {mode: plain(mode) for mode, _ in cases}
    seen = {mode: difference(weights, weights_of(model(mode))) for mode, weights in expected.items()}
    for mode, name in cases:
        seen[f"{mode}:{name}"] = difference(trained(mode, name, distributed), expected[mode])
    if distributed.is_main:
        (Path(sys.argv[2]) / f"{distributed.world_size}-rings.json").write_text(json.dumps(seen))
    distributed.close()


if __name__ == "__main__":
    run_rank(main)
