"""Explanation of a full GPU: what was done, what was planned, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mobius_train.checkpoint.resume import how_to_go_on
from mobius_train.config import RunConfig
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed

# In errors of CUDA and its libraries, which have no class of their own.
SIGNS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


@contextmanager
def explained_out_of_memory(config: RunConfig, spread: Spread, distributed: Distributed) -> Iterator[None]:
    """Context that turns an error of a full memory into a MobiusError with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS):
            raise MobiusError(_explanation(distributed.watch.doing, config, spread, error)) from error
        raise


def _explanation(doing: str, config: RunConfig, spread: Spread, error: RuntimeError) -> str:
    # These imports take a second, which other runs do not need.
    from mobius_train.plan.planner import plan

    try:
        planned = f"{plan(config, spread).peak / 2**30:.1f} GiB are planned for this recipe (docs/memory.md)"
    except MobiusError as problem:
        planned = f"this recipe cannot be planned: {problem}"
    lower = "set train_batch_size lower and gradient_accumulation_steps higher"
    if config.train_batch_size == 1:
        lower = "use smaller buckets, or a smaller data.resolution or data.num_frames"
    if not config.gradient_checkpointing:
        lower = f"set gradient_checkpointing=true, or {lower}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
    return (
        f"the GPU's memory is full in {doing}: {reason}\n{planned}; {lower}. tools/plan_memory.py lists changes that"
        f" fit. If there is a checkpoint, {how_to_go_on(config, config.output_dir)}"
    )
