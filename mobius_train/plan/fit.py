"""Compare a run's planned memory with the free memory of its ranks' GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mobius_train.config import RunConfig
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.job.heartbeat import name_of
from mobius_train.plan.planner import plan


class Fit(NamedTuple):
    """A description of planned and free memory; the ranks with too little; the planned bytes of a rank without the
    CUDA context, None if nothing was planned.
    """

    text: str
    too_small: list[str]
    planned: int | None = None


def fit(config: RunConfig, spread: Spread, distributed: Distributed) -> Fit:
    """Compare planned and free memory. Collective.

    Raises:
        MobiusError: the run cannot be planned.
    """
    if not config.check_memory:
        return Fit("memory not planned", [])
    free = [size for size in distributed.gather_objects(free_memory()) if size is not None]
    if len(free) < distributed.world_size:
        return Fit("no GPU to plan for", [])
    needed = _planned(config, spread, distributed)
    too_small = [
        f"{name_of(rank, distributed.nodes)}: its GPU has {_gib(size)} GiB free, but {_gib(needed)} GiB are planned:"
        " tools/plan_memory.py lists possible changes; check_memory=false skips this check"
        for rank, size in enumerate(free)
        if size < needed
    ]
    return Fit(f"{_gib(needed)} GiB planned, {_gib(min(free))} free", too_small, needed)


def free_memory() -> int | None:
    """Free bytes on this rank's GPU, given all programs that use it; None without a GPU."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def _planned(config: RunConfig, spread: Spread, distributed: Distributed) -> int:
    """Bytes that every rank needs in addition to its existing CUDA context. Computed on rank 0."""
    try:
        return distributed.on_main(lambda: plan(config, spread).allocated)
    except MobiusError as error:
        raise MobiusError(f"the memory cannot be planned: {error}; check_memory=false skips this check") from error


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
