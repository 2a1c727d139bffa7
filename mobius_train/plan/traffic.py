"""Bytes that collectives transfer in an optimizer step under DeepSpeed's ZeRO, counted in whole tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of an optimizer step, by kind of collective."""

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0

    def sent(self, ranks: int) -> float:
        """Bytes sent by each rank in ring algorithms; an all-reduce is a reduce-scatter and an all-gather."""
        share = (ranks - 1) / ranks
        return share * (2 * self.all_reduce + self.all_gather + self.reduce_scatter)


def traffic(parameters: int, zero_stage: int, *, accumulation: int, value_bytes: int = 2, gathers: int = 1) -> Traffic:
    """The traffic of a step; only trained parameters are communicated.

    Args:
        parameters: the number of trained parameters.
        zero_stage: 0 to 3.
        accumulation: micro-batches per step. Stages 2 and 3 keep no unsharded gradients, so they reduce in each one.
        value_bytes: bytes of a parameter and of a gradient in collectives: 2 in bf16 and fp16, 4 in float32.
        gathers: number of times that stage 3 gathers the parameters in a micro-batch: once if they stay gathered
            between forward and backward pass (`stage3_max_live_parameters`, 1e9 by default, is larger), else twice.

    Source: tests/plan/test_traffic.py counts the collectives. Stages 1 and 2 do not scatter: DeepSpeed all-reduces
    buckets, and every rank keeps its part of them (`use_multi_rank_bucket_allreduce`).
    """
    size = float(parameters * value_bytes)
    if zero_stage == 0:
        return Traffic(all_reduce=size)
    if zero_stage == 1:
        return Traffic(all_reduce=size, all_gather=size)
    if zero_stage == 2:
        return Traffic(all_reduce=size * accumulation, all_gather=size)
    return Traffic(all_gather=size * accumulation * gathers, reduce_scatter=size * accumulation)
