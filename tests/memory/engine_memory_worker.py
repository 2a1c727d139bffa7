"""Started on several ranks by test_engines.py: what DeepSpeed really allocates in a step of a tiny run.

    engine_memory_worker.py <recipe> <ds_configs> <folder> <stage>:<precision>[,...]

Rank 0 writes <folder>/measured.json: bytes by case, the most that any rank has; what lives between steps apart from
frozen models and encoders, and the most that a step allocates beside that.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from mobius_train import environment

launch = environment.prepare()  # before torch and DeepSpeed are imported

# ruff: noqa: E402
import torch
import torch.distributed as dist
from torch import Tensor

from mobius_train.cli import run_rank
from mobius_train.config import load
from mobius_train.engine import distributed as ranks
from mobius_train.engine.deepspeed import DeepSpeedEngine
from mobius_train.engine.ds_config import read, resolve
from mobius_train.memory.trace import Recorder, rounded
from mobius_train.run import engine_settings
from mobius_train.tasks.build import build_task


def tensors() -> dict[int, Tensor]:
    """A tensor for each storage that Python can reach."""
    return {t.untyped_storage()._cdata: t for t in gc.get_objects() if isinstance(t, Tensor) and t.device.type == "cpu"}


def optimizer_step(task: Any, engine: Any, batches: Any) -> None:
    report = None
    while report is None:
        loss = task.loss(engine, next(batches)).mean()
        engine.backward(loss)
        del loss
        report = engine.step(1e-4)


def case(recipe: Path, ds_json: Path, precision: str, distributed: ranks.Distributed) -> dict[str, int]:
    config = load(recipe, [f"mixed_precision='{precision}'"])
    settings = engine_settings(config)
    gc.collect()
    before = set(tensors())
    task: Any = build_task(config, distributed)
    frozen = {p.untyped_storage()._cdata for p in task.denoiser.frozen.parameters()} if task.denoiser.frozen else set()
    for encoder in (task.encoders.images.vae, task.encoders.text.model):
        frozen |= {t.untyped_storage()._cdata for t in (*encoder.parameters(), *encoder.buffers())}
    engine = DeepSpeedEngine(
        task.trained, settings, resolve(read(ds_json), settings, distributed.world_size), distributed
    )
    # What CUDA defaults to, and CPUs do not.
    for group in engine._engine.optimizer.param_groups:
        group["foreach"] = True
    batches = task.training_batches(0)
    optimizer_step(task, engine, batches)
    gc.collect()
    resident = sum(
        rounded(tensor.untyped_storage().nbytes()) for key, tensor in tensors().items() if key not in before | frozen
    )
    with Recorder() as recorder:
        optimizer_step(task, engine, batches)
    peak = recorder.trace().peak
    most = torch.tensor([resident, peak])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    engine.close()
    return {"resident": int(most[0]), "beside": int(most[1])}


def main() -> None:
    recipe, ds_configs, folder, cases = sys.argv[1:]
    distributed = ranks.start(launch)
    seen = {}
    for name in cases.split(","):
        stage, precision = name.split(":")
        seen[name] = case(Path(recipe), Path(ds_configs) / f"{stage}.json", precision, distributed)
    if distributed.is_main:
        (Path(folder) / "measured.json").write_text(json.dumps(seen))
    distributed.close()


if __name__ == "__main__":
    run_rank(main)
