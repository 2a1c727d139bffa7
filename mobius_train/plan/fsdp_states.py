"""FSDP2's memory on each rank as `engine.fsdp` uses it. Source: torch.distributed.fsdp._fully_shard.

Master weights, moments and gradients are float32 shards. Each layer's weights are gathered when it runs. In the forward
pass the collective's buffer exists at the same time, in the backward pass the buffer of the next layer.

Weights outside the layers stay gathered from the forward pass to the end of the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mobius_train.config_sections import FsdpConfig
from mobius_train.plan.adam_states import FP32, Adam
from mobius_train.plan.simulate import Shape, Simulation
from mobius_train.plan.trace import NEVER, Bytes, rounded
from mobius_train.plan.zero_states import (
    AVERAGE,
    BUCKETS,
    FROZEN,
    GATHERED,
    GRADIENTS,
    MASTERS,
    OPTIMIZER,
    CurveParts,
    EngineMemory,
)


def fsdp(
    sim: Simulation, settings: FsdpConfig, shard_size: int, accumulation: int, use_ema: bool, adam: Adam
) -> EngineMemory:
    """Memory of the first rank, which holds the most: other ranks may have fewer rows or none."""
    shards = [_rows(shape, shard_size) * math.prod(shape[1:]) for unit in sim.units for shape in unit]
    high = sum(rounded(elements * FP32) for elements in shards)
    states = {
        MASTERS: high,
        OPTIMIZER: sum(adam.moments(elements) for elements in shards),
        AVERAGE: high if use_ema else 0,
    }
    step = _Step(sim, shard_size, settings, accumulation > 1)
    frozen = sum(rounded(elements * sim.itemsize) for elements in sim.frozen_inside)
    reduced = sum(unit.reduced for unit in step.units)
    # Between micro-batches gradients are not reduced and stay unsharded, in float32.
    between = sum(unit.gradients for unit in step.units) if accumulation > 1 else 0
    if settings.cpu_offload:
        return EngineMemory({FROZEN: frozen}, step.during, {}, between, states | {GRADIENTS: reduced})
    return EngineMemory({FROZEN: frozen} | states, step.during, {GRADIENTS: reduced}, between)


@dataclass(frozen=True)
class _Unit:
    """Bytes of parameters that are gathered and reduced together.

    Attributes:
        weights: gathered weights.
        gradients: unsharded gradients in float32.
        reduced: this rank's shard of the gradients.
    """

    weights: int
    gradients: int
    reduced: int

    @staticmethod
    def of(shapes: tuple[Shape, ...], ranks: int, itemsize: int) -> _Unit:
        # Padded to the same number of rows on every rank.
        padded = [_rows(shape, ranks) * ranks * math.prod(shape[1:]) for shape in shapes]
        return _Unit(
            sum(rounded(elements * itemsize) for elements in padded),
            rounded(sum(padded) * FP32),
            rounded(sum(padded) // ranks * FP32),
        )


class _Step:
    """Gathered weights and unreduced gradients at each time of the last micro-batch of a step."""

    def __init__(self, sim: Simulation, ranks: int, settings: FsdpConfig, accumulates: bool) -> None:
        every = [_Unit.of(shapes, ranks, sim.itemsize) for shapes in sim.units]
        trace = sim.step
        # In execution order; frozen units are never gathered.
        order = [int(i) for i in np.argsort(trace.entered, kind="stable") if sim.units[i] and trace.left[i] < NEVER]
        layers, self._root = [every[i] for i in order], every[-1]
        self.units = (*layers, self._root)
        self._weights = np.array([layer.weights for layer in layers], dtype=np.int64)
        self._gradients = np.array([layer.gradients for layer in layers], dtype=np.int64)
        self._reduced = np.array([layer.reduced for layer in layers], dtype=np.int64)
        self._entered, self._left = trace.entered[order], trace.left[order]
        self._forward = trace.marks["forward"]
        self._alone, self._settings, self._accumulates = ranks == 1, settings, accumulates

    def during(self, gradients: Bytes) -> CurveParts:
        """Bytes at each time, given the bytes of complete gradients."""
        times = np.arange(len(gradients))[:, None]
        complete, at_its_end = times >= self._left, times == self._left
        # A layer's gradients are reduced into a buffer that lives until the next layer's buffer.
        reduced_from = self._gradients if self._accumulates else self._weights
        unreduced = np.maximum(gradients - complete @ self._weights, 0) + at_its_end @ reduced_from
        if self._accumulates:
            unreduced += ~complete @ self._gradients + self._root.gradients
        shares = at_its_end if self._settings.cpu_offload else complete
        latest = np.where(complete.any(1), self._gradients[complete.argmax(1)], 0)
        return {
            GATHERED: self._root.weights + self._gathered(times, complete),
            GRADIENTS: unreduced + shares @ self._reduced,
            BUCKETS: latest,
        }

    def _gathered(self, times: Bytes, complete: NDArray[np.bool_]) -> Bytes:
        """Gathered layers, including the buffers of collectives; a single rank has no buffers."""
        entered = times >= self._entered
        count = entered.sum(1)
        current = np.where(count > 0, self._weights[count - 1], 0)
        buffers = 0 if self._alone else current
        forward = (current if self._settings.reshard_after_forward else entered @ self._weights) + buffers

        # The running layer is the last one with incomplete gradients; the layer before it is being gathered.
        left = len(self._weights) - (~complete)[:, ::-1].argmax(1) - complete.all(1) * len(self._weights)
        padded = np.concatenate([[0, 0], self._weights])
        backward = padded[left + 1] + (0 if self._alone else padded[left])
        if not self._settings.reshard_after_forward:
            backward = ~complete @ self._weights
        return np.where(times[:, 0] < self._forward, forward, backward)


def _rows(shape: Shape, ranks: int) -> int:
    """Rows of the first rank's shard."""
    return math.ceil(shape[0] / ranks)
