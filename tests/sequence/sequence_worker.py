"""Started on several ranks by test_exact.py: gradients of models that a sequence group shares.

    sequence_worker.py <folder> <ranks of a group> <case>[;<case>...]

A case is <model>:<treatment>:<dtype>, see `MODELS` and `TREATMENTS`; the dtype `control` is float64 with norms that
each rank computes alone. Rank 0 writes <folder>/<ranks of a group>.json, by case: how far the mean of all ranks'
gradients is from the gradient of one rank on the whole batch, over the largest gradient (`apart`); the bytes that it
gave torch's collectives for other ranks (`counted`), and those that the planner's simulated group sends (`planned`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from mobius_train.job import environment

launch = environment.prepare()  # before torch is imported

# ruff: noqa: E402
import torch
import torch.distributed as dist
from token_models import batch_for as token_batch
from token_models import parallel_of, tiny_model
from torch import Tensor
from unets import batch_for, tiny_unet

from mobius_train.job.distributed import Distributed
from mobius_train.models import ParallelUNet, SerialUNet
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.sd3.serial import SerialSD3
from mobius_train.ring_shape import RingShape
from mobius_train.sequence.group import SequenceGroup, SimulatedGroup, make_group
from mobius_train.sequence.group_norm import share_norms

CLIPS, FRAMES = 2, 5


def unet(*shape: Any) -> tuple[Any, Any]:
    model = tiny_unet("emoji")
    batch = batch_for(model, CLIPS, FRAMES)
    return (ParallelUNet.from_unet2d(model, *shape) if shape else SerialUNet.from_unet2d(model)), batch


def tokens(kind: str, **shape: Any) -> tuple[Any, Any]:
    model = tiny_model(kind)
    batch = token_batch(model, clips=CLIPS, frames=FRAMES)
    return (parallel_of(model, RingShape(**shape)) if shape else SerialSD3.from_sd3(model)), batch


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "paper": lambda: unet(1.0),
    "half, tail": lambda: unet(0.5, 2, True),
    "tail alone": lambda: unet(0, 1, True),
    "trained tail": lambda: unet(0.5, 2, False, True),
    "serial": lambda: unet(),
    "vchitect": lambda: tokens("sd3"),
    "sd3": lambda: tokens("sd3", ring_every=1),
    "sd35, half, tail": lambda: tokens(
        "sd35", ring_width=0.5, fusion_depth=2, tail_temporal_layers=True, context_latents=2
    ),
    "pixart": lambda: tokens("pixart", fusion_depth=1, tail_temporal_layers=True, trained_tail=True),
}
TREATMENTS = {
    "keep": LayerMemory(),
    "recompute": LayerMemory(gradient_checkpointing=True),
    "selective": LayerMemory(recompute_activations=True),
    "offload": LayerMemory(activation_offload=0.5),
}


counted = 0


def counting(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """torch's all-to-all, which counts the bytes for other ranks."""

    def run(output: Tensor, given: Tensor, of: list[int], to: list[int], **options: Any) -> Any:
        global counted
        counted += (given.numel() - to[dist.get_rank(options["group"])]) * given.element_size()
        return exchange(output, given, of, to, **options)

    return run


dist.all_to_all_single = counting(dist.all_to_all_single)


def gradients(model: Any, batch: tuple[Any, ...], target: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model.predict(*batch) - target).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(case: str, distributed: Distributed, group: SequenceGroup) -> dict[str, Any]:
    name, treatment, precision = case.split(":")
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    # Also of layers that start as zeros: every exchange has an effect.
    for parameter in model.trained.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    dtype = torch.float32 if precision == "float32" else torch.float64
    model.to(dtype)
    sample, timestep, conditions = batch.given()
    whole = (sample.to(dtype), timestep, conditions.to(dtype=dtype))
    target = torch.randn(sample.shape, dtype=dtype)
    expected = gradients(model, whole, target)
    # Each group has its part of the clips.
    clips = CLIPS * group.size // distributed.world_size
    mine = slice(clips * (distributed.rank // group.size), clips * (distributed.rank // group.size + 1))
    own = (whole[0][mine], timestep[mine], whole[2].map(lambda tensor: tensor[mine]))
    model.set_memory(TREATMENTS[treatment])
    simulated = SimulatedGroup(group.rank, group.size)
    model.set_sequence(simulated)
    gradients(model, own, target[mine])
    model.set_sequence(group)
    if precision == "control":
        share_norms(model, None)
    before = counted
    found = gradients(model, own, target[mine])
    assert found.keys() == expected.keys()
    for gradient in found.values():
        dist.all_reduce(gradient)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    ranks = distributed.world_size
    apart = max(float((found[key] / ranks - expected[key]).abs().max()) for key in expected)
    return {"apart": apart / largest, "counted": counted - before, "planned": simulated.sent.bytes["exchange"]}


folder, size, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(";")
with Distributed(launch) as distributed:
    # Without overlap on three ranks.
    group = make_group(distributed.rank, distributed.world_size, size, timedelta(seconds=60), overlap=size != 3)
    seen = {case: compare(case, distributed, group) for case in cases}
    if distributed.is_main:
        (folder / f"{size}.json").write_text(json.dumps(seen))
