"""Estimated time of an optimizer step from its computation and its traffic on a given interconnect.

Assumptions: collectives are rings over all GPUs, and links between nodes are the slowest. Gradient reduction overlaps
with the backward pass, and stage 3's gathering with all computation. The gathering after the step in stages 1 and 2
does not overlap. Not included: latencies (about 1 ms in a step of this size), the loader, slow nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from mobius_train.plan.traffic import Traffic, traffic

# The backward pass's share of a micro-batch's FLOPs.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class Interconnect:
    """The links of a cluster, in bytes per second and direction.

    Attributes:
        within: from one GPU to the others in its node.
        between: from one node to the others, summed over its network cards.
        efficiency: share of a link's bandwidth that collectives achieve.
    """

    within: float
    between: float
    gpus_per_node: int = 8
    efficiency: float = 0.8

    def bandwidth(self, gpus: int) -> float:
        """Bytes per second sent by each GPU in a ring; a link between nodes carries one GPU's traffic."""
        slowest = self.within if gpus <= self.gpus_per_node else min(self.within, self.between)
        return slowest * self.efficiency


@dataclass(frozen=True)
class Workload:
    """A training step of one GPU.

    Attributes:
        parameters: the number of trained parameters.
        flop: floating point operations of a micro-batch, forward and backward.
        flops: floating point operations per second that the GPU achieves.
        accumulation: micro-batches per step.
    """

    parameters: int
    flop: float
    flops: float
    accumulation: int = 1

    @property
    def compute_seconds(self) -> float:
        return self.flop * self.accumulation / self.flops

    def traffic(self, zero_stage: int) -> Traffic:
        """The collectives of a step in 16-bit precision."""
        return traffic(self.parameters, zero_stage, accumulation=self.accumulation)


def step_seconds(work: Workload, zero_stage: int, gpus: int, interconnect: Interconnect) -> float:
    """The duration of a step in seconds; the scaling efficiency is `work.compute_seconds` divided by it."""
    sent, speed, compute = work.traffic(zero_stage), interconnect.bandwidth(gpus), work.compute_seconds
    if zero_stage == 3:
        return max(compute, sent.sent(gpus) / speed)
    reducing = Traffic(all_reduce=sent.all_reduce).sent(gpus) / speed
    # Stages 0 and 1 reduce in the last micro-batch only.
    hiding = compute * BACKWARD / (1 if zero_stage == 2 else work.accumulation)
    gathering = Traffic(all_gather=sent.all_gather).sent(gpus) / speed
    return compute + max(0.0, reducing - hiding) + gathering
