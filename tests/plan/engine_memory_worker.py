"""Started on several ranks by test_engines.py: what an engine really allocates in a step of a tiny run.

    engine_memory_worker.py <recipe> <ds_configs> <folder> <engine>:<precision>[:key=value...][,...]

The engine is the name of a DeepSpeed configuration, or fsdp.

Rank 0 writes <folder>/measured.json: bytes by case, the most that any rank has; what lives between steps apart from
frozen models and encoders, and the most that a step allocates beside that.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from mobius_train.job import environment

launch = environment.prepare()  # before torch and DeepSpeed are imported

# ruff: noqa: E402
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.fsdp._fully_shard._fsdp_param import alloc_storage, free_storage
from torch.distributed.tensor import DTensor

from mobius_train.cli import run_rank
from mobius_train.config import load
from mobius_train.engine.choose import choose_engine
from mobius_train.engine.spread import spread_of
from mobius_train.job.distributed import Distributed
from mobius_train.plan.trace import Recorder, rounded
from mobius_train.storages import Storage
from mobius_train.tasks.build_task import build_task
from mobius_train.trainer import micro_batch


def tensors() -> dict[int, Tensor]:
    """A tensor for each storage that Python can reach; a DTensor's own has no memory, its local tensor's has."""
    found = (t for t in gc.get_objects() if isinstance(t, Tensor) and not isinstance(t, DTensor))
    return {t.untyped_storage()._cdata: t for t in found if t.device.type == "cpu"}


def watch_gathered(recorder: Recorder) -> None:
    """Count what FSDP gathers: it gives memory to storages that exist, past all operators."""
    standing: dict[int, Storage] = {}

    def alloc(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.size() == 0:
            record = standing[storage._cdata] = Storage(tensor.numel() * tensor.itemsize, "gathered", "gathered")
            recorder.made.append(record)
        alloc_storage(tensor)

    def free(tensor: Tensor) -> None:
        record = standing.pop(tensor.untyped_storage()._cdata, None)
        if record is not None:
            record.freed = len(recorder.made)
        free_storage(tensor)

    _fsdp_param.alloc_storage, _fsdp_param.free_storage = alloc, free


def optimizer_step(task: Any, engine: Any, batches: Any) -> None:
    report = None
    while report is None:
        micro_batch(task, engine, next(batches))
        report = engine.step(1e-4)


def case(recipe: Path, ds_path: Path | None, overrides: list[str], distributed: Distributed) -> dict[str, int]:
    config = load(recipe, overrides)
    gc.collect()
    before = set(tensors())
    task: Any = build_task(config, distributed)
    parts = task.parts
    frozen = (
        {p.untyped_storage()._cdata for p in parts.denoiser.frozen.parameters()} if parts.denoiser.frozen else set()
    )
    text = [encoder.model for encoder in parts.encoders.text.encoders.values()]
    for encoder in (parts.encoders.images.vae, *text):
        frozen |= {t.untyped_storage()._cdata for t in (*encoder.parameters(), *encoder.buffers())}
    spread = spread_of("fsdp" if ds_path is None else "deepspeed", ds_path, launch)
    engine: Any = choose_engine(config, spread)(task.trained, task.units, distributed)
    # What CUDA's unfused AdamW defaults to, and CPUs do not.
    for group in (engine._optimizer if ds_path is None else engine._engine.optimizer).param_groups:
        group["foreach"] = True
    batches = task.training_batches(0)
    optimizer_step(task, engine, batches)
    gc.collect()
    resident = sum(
        rounded(tensor.untyped_storage().nbytes()) for key, tensor in tensors().items() if key not in before | frozen
    )
    recorder = Recorder()
    watch_gathered(recorder)
    with recorder:
        optimizer_step(task, engine, batches)
    peak = recorder.trace().peak
    most = torch.tensor([resident, peak])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    engine.close()
    return {"resident": int(most[0]), "beside": int(most[1])}


def main() -> None:
    recipe, ds_configs, folder, cases = sys.argv[1:]
    distributed = Distributed(launch)
    seen = {}
    for name in cases.split(","):
        engine, precision, *overrides = name.split(":")
        ds_path = None if engine == "fsdp" else Path(ds_configs) / f"{engine}.json"
        seen[name] = case(Path(recipe), ds_path, [f"mixed_precision='{precision}'", *overrides], distributed)
    if distributed.is_main:
        (Path(folder) / "measured.json").write_text(json.dumps(seen))
    distributed.close()


if __name__ == "__main__":
    run_rank(main)
