"""From what is sent to how long a step takes, on a stated interconnect.

The model: rings over all GPUs, whose slowest link is that between nodes; reducing gradients hides behind the backward
pass, and stage 3's gathering behind all of the computing; the gathering after the step of stages 1 and 2 hides behind
nothing. Left out: latencies (some 1 ms in a step of these sizes), the loader, slow nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from mobius_train.plan.traffic import Traffic

# Of a forward and backward pass; the forward pass is a third.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class Interconnect:
    """Bytes per second, one way.

    Attributes:
        within: of a GPU to the others of its node.
        between: of a node to the others, all its cards together.
        efficiency: what collectives reach of it.
    """

    name: str
    gpus_per_node: int
    within: float
    between: float
    efficiency: float = 0.8

    def bandwidth(self, gpus: int) -> float:
        """What each GPU sends per second in a ring: a node's link carries what one GPU sends."""
        slowest = self.within if gpus <= self.gpus_per_node else min(self.within, self.between)
        return slowest * self.efficiency


@dataclass(frozen=True)
class Workload:
    """A training step of one GPU.

    Attributes:
        flop: of the forward and backward passes of a micro-batch, together.
        flops: what the GPU reaches per second.
    """

    parameters: int
    flop: float
    flops: float
    accumulation: int = 1

    @property
    def compute_seconds(self) -> float:
        return self.flop * self.accumulation / self.flops


def step_seconds(work: Workload, zero_stage: int, sent: Traffic, gpus: int, interconnect: Interconnect) -> float:
    """How long a step takes; `work.compute_seconds` over it is the efficiency."""
    speed, compute = interconnect.bandwidth(gpus), work.compute_seconds
    if zero_stage == 3:
        return compute + max(0.0, sent.sent(gpus) / speed - compute)
    reducing = Traffic(all_reduce=sent.all_reduce).sent(gpus) / speed
    # Before the last micro-batch stages 0 and 1 send nothing.
    hiding = compute * BACKWARD / (1 if zero_stage == 2 else work.accumulation)
    gathering = Traffic(all_gather=sent.all_gather).sent(gpus) / speed
    return compute + max(0.0, reducing - hiding) + gathering
