"""The explanation of a GPU's full memory."""

from __future__ import annotations

import torch

from mobius_train.config import RunConfig
from mobius_train.engine.spread import Spread
from mobius_train.plan.planner import plan

# In errors of CUDA and its libraries, which have no class of their own.
FULL = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in FULL)


def explain_out_of_memory(error: RuntimeError, doing: str, config: RunConfig, spread: Spread) -> str:
    """The place, the planned memory, and changes that help.

    Args:
        doing: what the rank did, with the sizes of the micro-batch.
    """
    try:
        planned = f"{plan(config, spread).allocated / 2**30:.1f} GiB are planned for this recipe (docs/memory.md)"
    # Whatever a plan fails on must not hide the error that it explains.
    except Exception as problem:
        planned = f"this recipe cannot be planned: {problem}"
    lower = "set train_batch_size lower and gradient_accumulation_steps higher"
    if config.train_batch_size == 1:
        lower = "use smaller buckets, or a smaller data.resolution or data.num_frames"
    if not config.gradient_checkpointing:
        lower = f"set gradient_checkpointing=true, or {lower}"
    lines = str(error).strip().splitlines()
    return (
        f"the GPU's memory is full in {doing}: {lines[0] if lines else 'no details'}\n{planned}; {lower}."
        " tools/plan_memory.py lists changes that fit"
    )
