"""What collectives carry in an optimizer step under DeepSpeed's ZeRO, counted in the bytes of whole tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of an optimizer step, by kind of collective."""

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends by ring algorithms: an all-reduce is a reduce-scatter and an all-gather."""
        share = (ranks - 1) / ranks
        return share * (2 * self.all_reduce + self.all_gather + self.reduce_scatter)


def traffic(parameters: int, zero_stage: int, *, accumulation: int, value_bytes: int = 2, gathers: int = 1) -> Traffic:
    """Of the trained parameters; frozen ones never travel.

    Args:
        accumulation: micro-batches of a step. Stages 2 and 3 keep no whole gradients, so they reduce those of each.
        value_bytes: of a parameter and a gradient where the engine computes; 2 in bf16 and fp16, 4 in float32.
        gathers: how often stage 3 gathers the parameters for a micro-batch: once where they stay whole between the
            forward and the backward pass (`stage3_max_live_parameters`, 1e9 by default, are more), else twice.

    Source: counted by tests/plan/test_traffic.py. Stages 1 and 2 do not scatter: DeepSpeed all-reduces buckets, of which every
    rank keeps its part (`use_multi_rank_bucket_allreduce`).
    """
    size = float(parameters * value_bytes)
    if zero_stage == 0:
        return Traffic(all_reduce=size)
    if zero_stage == 1:
        return Traffic(all_reduce=size, all_gather=size)
    if zero_stage == 2:
        return Traffic(all_reduce=size * accumulation, all_gather=size)
    return Traffic(all_gather=size * accumulation * gathers, reduce_scatter=size * accumulation)
