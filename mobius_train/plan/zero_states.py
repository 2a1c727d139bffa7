"""An engine's memory on each rank, apart from activations.

Each function names its source; tests compare the results with real engines. Legend: n trained elements, w ranks,
p elements of a rank's partition, b bytes per element in the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mobius_train.plan.adam_states import FLOAT32, FP32, Adam
from mobius_train.plan.simulate import Simulation
from mobius_train.plan.trace import Bytes, rounded

TRAINED, FROZEN, MASTERS = "trained weights", "frozen weights", "master weights"
GRADIENTS, OPTIMIZER, AVERAGE = "gradients", "optimizer states", "moving average"
BUCKETS, GATHERED, STEP = "communication buckets", "gathered weights", "optimizer's transients"
# Elements that DeepSpeed reduces at once at stage 0 (engine.py, MEMORY_OPT_ALLREDUCE_SIZE).
REDUCED_AT_ONCE = 500_000_000
# Defaults of DeepSpeed's zero/config.py, in elements.
PERSISTENCE_THRESHOLD, REUSE_DISTANCE = 100_000, 1_000_000_000

Parts = dict[str, int]
CurveParts = dict[str, Bytes]


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on the rank that holds the most.

    Attributes:
        resident: bytes that live from the first step to the end.
        during: additional bytes during the last micro-batch of a step, given the complete gradients at each time.
        between: gradients kept between the micro-batches of a step.
        stepping: additional bytes while gradients are reduced or the optimizer steps, whichever is more.
        host: bytes that offloading keeps in host memory.
        frozen_whole: every rank has all frozen weights inside the trained module unsharded.
    """

    resident: Parts
    during: Callable[[Bytes], CurveParts]
    stepping: Parts
    between: int = 0
    host: Parts = field(default_factory=dict)
    frozen_whole: bool = True


def ddp(sim: Simulation, accumulation: int, use_ema: bool) -> EngineMemory:
    """torch's DistributedDataParallel with its defaults, as in most single-file trainers.

    Every gradient has a copy in a bucket (`gradient_as_bucket_view=False`), and weights are float32.
    """
    whole = _whole(sim.trained, FP32)
    return EngineMemory(
        resident={
            FROZEN: _whole(sim.frozen_inside, FP32),
            TRAINED: whole,
            OPTIMIZER: _moments(FLOAT32, sim.trained),
            BUCKETS: whole,
            AVERAGE: whole if use_ema else 0,
        },
        during=_standing(whole) if accumulation > 1 else lambda gradients: {GRADIENTS: gradients},
        # torch's default implementation computes the square roots of all second moments at once.
        stepping={GRADIENTS: whole, STEP: whole},
        between=whole if accumulation > 1 else 0,
    )


def deepspeed(
    sim: Simulation, config: dict[str, Any], ranks: int, accumulation: int, use_ema: bool, adam: Adam
) -> EngineMemory:
    """DeepSpeed ZeRO with a configuration completed by `resolve` and `with_bucket_sizes`."""
    zero = config["zero_optimization"]
    stage = {0: _stage0, 1: _stage1, 2: _stage2, 3: _stage3}[zero["stage"]]
    return stage(_Setting(sim, zero, ranks, accumulation, use_ema, adam))


@dataclass(frozen=True)
class _Setting:
    sim: Simulation
    zero: dict[str, Any]
    ranks: int
    accumulation: int
    use_ema: bool
    adam: Adam

    @property
    def b(self) -> int:
        return self.sim.itemsize

    @property
    def n(self) -> int:
        return sum(self.sim.trained)

    @property
    def accumulates(self) -> bool:
        return self.accumulation > 1

    def offloads(self, key: str) -> bool:
        return str(self.zero.get(key, {}).get("device", "none")) == "cpu"

    def frozen(self) -> int:
        return _whole(self.sim.frozen_inside, self.b)


def _stage0(s: _Setting) -> EngineMemory:
    """engine.py (`buffered_allreduce_fallback`), fp16/unfused_optimizer.py."""
    low, high = _whole(s.sim.trained, s.b), _whole(s.sim.trained, FP32)
    mixed = s.b != FP32
    # Gradients are reduced in flat copies.
    copy = rounded(_largest_run(s.sim.trained, REDUCED_AT_ONCE) * s.b)
    # float32 gradients.
    transients = high * mixed
    return EngineMemory(
        resident={
            FROZEN: s.frozen(),
            TRAINED: low,
            MASTERS: high if mixed else 0,
            OPTIMIZER: _moments(s.adam, s.sim.trained),
            AVERAGE: high if s.use_ema else 0,
        },
        during=_standing(low) if s.accumulates else lambda gradients: {GRADIENTS: gradients},
        stepping={GRADIENTS: low, **({BUCKETS: copy} if copy > transients else {STEP: transients})},
        between=low if s.accumulates else 0,
    )


def _stage1(s: _Setting) -> EngineMemory:
    """zero/stage_1_and_2.py: unsharded gradients are kept until the end of the last micro-batch, then reduced."""
    shard = _Partition(s)
    low = _whole(s.sim.trained, s.b)
    reducing = shard.buckets() + rounded(shard.bucket * s.b)
    stepping = {GRADIENTS: shard.gradients, STEP: shard.step_transients()}
    if low + reducing > sum(stepping.values()):
        stepping = {GRADIENTS: low, BUCKETS: reducing}

    def during(gradients: Bytes) -> CurveParts:
        begun = (gradients > 0) * shard.buckets()
        return {GRADIENTS: np.full_like(gradients, low) if s.accumulates else gradients, BUCKETS: begun}

    return EngineMemory(shard.resident(), during, stepping, low if s.accumulates else 0, shard.host())


def _stage2(s: _Setting) -> EngineMemory:
    """zero/stage_1_and_2.py: gradients are reduced when a bucket is full, and only their owner keeps them."""
    shard = _Partition(s)
    kept = 0 if shard.offloaded else shard.gradients
    standing = kept if s.accumulates else 0

    def during(gradients: Bytes) -> CurveParts:
        copy = rounded(shard.bucket * s.b)
        # A full bucket adds a flat copy, and the last rank's share of this micro-batch's gradients.
        full = gradients > copy
        return {GRADIENTS: full * kept + standing, BUCKETS: (gradients > 0) * shard.buckets() + full * copy}

    stepping = {} if shard.offloaded else {GRADIENTS: kept, STEP: shard.step_transients()}
    return EngineMemory(shard.resident(), during, stepping, standing, shard.host())


class _Partition:
    """The partition of stages 1 and 2: all parameters concatenated and cut into w equal ranges."""

    def __init__(self, s: _Setting) -> None:
        self._s = s
        # 4-byte alignment of every rank's range.
        unit = 2 * s.ranks
        self.elements = math.ceil(s.n / unit) * unit // s.ranks
        self.bucket = int(s.zero["reduce_bucket_size"])
        self.offloaded = s.offloads("offload_optimizer")
        # A rank keeps the unsharded gradients of all parameters that overlap its range.
        self.gradients = rounded(max(self._touched(rank) for rank in range(s.ranks)) * s.b)

    def _touched(self, rank: int) -> int:
        ends = np.cumsum(self._s.sim.trained)
        starts = ends - self._s.sim.trained
        mine = (starts < (rank + 1) * self.elements) & (ends > rank * self.elements)
        return int(np.array(self._s.sim.trained)[mine].sum())

    def buckets(self) -> int:
        """Bytes of the buckets: two if communication overlaps, because one is filled while the other is sent."""
        return rounded(self.bucket * self._s.b) * (2 if self._s.zero.get("overlap_comm") else 1)

    def resident(self) -> Parts:
        s, shard = self._s, rounded(self.elements * FP32)
        parts = {FROZEN: s.frozen(), TRAINED: rounded(self.elements * s.ranks * s.b)}
        if self.offloaded:
            # zero/stage_1_and_2.py, temp_grad_buffer_for_gpu_offload.
            return parts | {BUCKETS: rounded(max(s.sim.trained) * s.b)}
        # The float32 partition is a copy even if the weights are float32.
        return parts | {MASTERS: shard, OPTIMIZER: s.adam.moments(self.elements), AVERAGE: shard if s.use_ema else 0}

    def step_transients(self) -> int:
        """Bytes of the partition's gradients, flat and in float32."""
        flat, high = rounded(self.elements * self._s.b), rounded(self.elements * FP32)
        return high + (0 if self._s.b == FP32 else flat)

    def host(self) -> Parts:
        if not self.offloaded:
            return {}
        s, shard = self._s, self.elements * FP32
        low = self.elements * s.b
        parts = {MASTERS: shard + low, OPTIMIZER: 2 * shard, GRADIENTS: shard + low * (1 + s.accumulates)}
        return parts | {AVERAGE: shard if s.use_ema else 0}


def _stage3(s: _Setting) -> EngineMemory:
    """zero/stage3.py, parameter_offload.py, partitioned_param_coordinator.py: every parameter is cut into w shards."""
    shards = [math.ceil(elements / s.ranks) for elements in s.sim.trained]
    total = sum(shards)
    low, high = rounded(total * s.b), rounded(total * FP32)
    threshold = int(s.zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD))
    every = (*s.sim.trained, *s.sim.frozen_inside)
    persistent = _whole([elements for elements in every if elements <= threshold], s.b)
    optimizer, parameters = s.offloads("offload_optimizer"), s.offloads("offload_param")
    bucket = rounded(int(s.zero["reduce_bucket_size"]) * s.b)
    frozen = sum(rounded(math.ceil(elements / s.ranks) * s.b) for elements in s.sim.frozen_inside)
    resident = {
        FROZEN: 0 if parameters else frozen,
        TRAINED: persistent + (0 if parameters else low),
        BUCKETS: bucket,
        GRADIENTS: 0 if optimizer else low,
    }
    host = {}
    # Even float32 weights are copied: DeepSpeed compares a device with a device name, which are never equal.
    states = {MASTERS: high, OPTIMIZER: s.adam.moments(total), AVERAGE: high if s.use_ema else 0}
    if optimizer:
        host = states | {GRADIENTS: low + high}
    else:
        resident |= states
    if parameters:
        host[TRAINED] = host.get(TRAINED, 0) + low + frozen

    # A module's weights stay gathered if they are reused within the reuse distance, as in the ring's last half.
    reuse = int(s.zero.get("stage3_max_reuse_distance", REUSE_DISTANCE))
    prefetch = int(s.zero.get("stage3_prefetch_bucket_size", 0))
    limit = (reuse // 2 + prefetch + max(every)) * s.b
    gatherable = sum(every) * s.b - persistent

    def during(gradients: Bytes) -> CurveParts:
        # Weights with complete gradients have been freed; a reduced bucket has one more copy.
        gathered = np.minimum(gatherable - np.minimum(gradients, gatherable), limit)
        return {GATHERED: gathered, BUCKETS: (gradients > 0) * bucket}

    transients = high + (low if s.b != FP32 else 0)
    return EngineMemory(resident, during, {} if optimizer else {STEP: transients}, 0, host, frozen_whole=False)


def _standing(nbytes: int) -> Callable[[Bytes], CurveParts]:
    """Gradients of earlier micro-batches, to which new ones are added."""
    return lambda gradients: {GRADIENTS: np.full_like(gradients, nbytes)}


def _moments(adam: Adam, elements: Iterable[int]) -> int:
    """Bytes of the moments of parameters that are updated one by one."""
    return sum(adam.moments(count) for count in elements)


def _whole(elements: Any, itemsize: int) -> int:
    """Bytes of separate tensors."""
    return sum(rounded(count * itemsize) for count in elements)


def _largest_run(elements: Any, limit: int) -> int:
    """The most elements in a run of tensors, where a run ends as soon as it exceeds the limit."""
    largest = run = 0
    for count in elements:
        run += count
        largest = max(largest, run)
        if run > limit:
            run = 0
    return largest
