"""The lifetimes of all storages of a program on fake or real tensors.

Time is counted in allocations: storage i is allocated at time i, and is alive until its death.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from mobius_train.storages import NEVER, Storage, StorageFollower

Bytes = NDArray[np.int64]

# CUDA's caching allocator allocates multiples of this (kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp).
BLOCK = 512


def rounded(nbytes: int) -> int:
    """The bytes that CUDA's allocator uses for a tensor of `nbytes` bytes."""
    return -(-nbytes // BLOCK) * BLOCK


@dataclass(frozen=True)
class Trace:
    """The storages allocated in a run, in order.

    Attributes:
        sizes: bytes of each storage, in the allocator's blocks; 0 in host memory.
        labels: the part of the program that allocated each storage.
        deaths: the time when each storage was freed.
        completed: the time when each storage became the complete gradient of a parameter; NEVER for most.
        marks: named times.
        flops: floating point operations by phase, of matrix products, convolutions and attention; a multiplication and
            an addition count as two.
        entered: the time when each watched unit was first called; NEVER if it was not.
        left: the time when the gradients of all parameters of each watched unit were complete.
        host: peak bytes in host memory.
    """

    sizes: Bytes
    labels: list[str]
    deaths: Bytes
    completed: Bytes
    marks: dict[str, int]
    flops: dict[str, int]
    entered: Bytes
    left: Bytes
    host: int = 0

    def activations(self) -> Bytes:
        """Bytes alive at each time, excluding complete gradients."""
        return _curve(self.sizes, np.minimum(self.deaths, self.completed))

    def gradients(self) -> Bytes:
        """Bytes of complete gradients at each time."""
        return _curve(self.sizes, self.deaths, np.minimum(self.completed, self.deaths))

    def saved(self, mark: str = "forward") -> dict[str, int]:
        """Bytes alive at a mark, by label. At the end of the forward pass these are saved for the backward pass."""
        return self._by_label(self._alive(self.marks[mark]))

    def at(self, time: int, mark: str = "forward") -> tuple[dict[str, int], int]:
        """Bytes alive at a time, excluding complete gradients: those alive at the mark, by label, and all others."""
        alive = self._alive(time) & (self.completed > time)
        saved = alive & self._alive(self.marks[mark])
        return self._by_label(saved), int(self.sizes[alive & ~saved].sum())

    @property
    def peak(self) -> int:
        """The most bytes alive at one time, including gradients."""
        return int((self.activations() + self.gradients()).max(initial=0))

    def _alive(self, time: int) -> NDArray[np.bool_]:
        return (np.arange(len(self.sizes)) <= time) & (self.deaths > time)

    def _by_label(self, chosen: NDArray[np.bool_]) -> dict[str, int]:
        sums: dict[str, int] = {}
        for index in np.flatnonzero(chosen):
            sums[self.labels[index]] = sums.get(self.labels[index], 0) + int(self.sizes[index])
        return {label: size for label, size in sums.items() if size}


class Recorder(StorageFollower):
    """Context manager that records a Trace."""

    def __init__(self) -> None:
        super().__init__("other")
        self._marks: dict[str, int] = {}
        self._flops: dict[str, int] = {}
        self._phase = "forward"
        self._entered: list[int] = []
        self._left: list[int] = []

    def watch_gradients(self, module: nn.Module) -> None:
        """Record when the gradients of the module's parameters are complete."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._complete))

    def watch_unit(self, modules: list[nn.Module]) -> None:
        """Record when the first of these modules is called, and when the gradients of all of them are complete."""
        unit = len(self._entered)
        self._entered.append(NEVER)
        self._left.append(NEVER)

        def enter(*_: object) -> None:
            self._entered[unit] = min(self._entered[unit], len(self.made))

        def leave(_: Tensor) -> None:
            # The call for the last parameter sets the final value.
            self._left[unit] = len(self.made)

        for module in modules:
            self._handles.append(module.register_forward_pre_hook(enter))
            for parameter in module.parameters():
                if parameter.requires_grad:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(leave))

    def mark(self, name: str, next_phase: str = "backward") -> None:
        """Name the current time; later floating point operations count for `next_phase`."""
        self._marks[name] = len(self.made)
        # Allocate 0 bytes, so that a storage freed before the mark is not alive at the mark's time.
        self.made.append(Storage(0, name, name))
        self._phase = next_phase

    def trace(self) -> Trace:
        """The trace recorded so far."""

        def array(values: Iterable[int]) -> Bytes:
            return np.array(list(values), dtype=np.int64)

        deaths = array(s.freed for s in self.made)
        return Trace(
            array(0 if s.on_host else rounded(s.nbytes) for s in self.made),
            [s.maker for s in self.made],
            deaths,
            array(s.completed for s in self.made),
            dict(self._marks),
            dict(self._flops),
            array(self._entered),
            array(self._left),
            int(_curve(array(s.nbytes if s.on_host else 0 for s in self.made), deaths).max(initial=0)),
        )

    def _track(self, func: Any, args: Any, kwargs: dict[str, Any] | None, result: Any) -> None:
        super()._track(func, args, kwargs, result)
        count = _flop_formula(func)
        if count is not None:
            flops = count(*args, **(kwargs or {}), out_val=result)
            self._flops[self._phase] = self._flops.get(self._phase, 0) + int(flops)

    def _complete(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = self.follow(parameter.grad.untyped_storage())
        gradient.completed = min(gradient.completed, len(self.made))


def _curve(sizes: Bytes, ends: Bytes, starts: Bytes | None = None) -> Bytes:
    """Bytes alive at each time; by default storage i counts from time i."""
    count = len(sizes)
    steps = np.zeros(count + 1, dtype=np.int64)
    np.add.at(steps, np.arange(count) if starts is None else np.minimum(starts, count), sizes)
    np.subtract.at(steps, np.minimum(ends, count), sizes)
    return np.cumsum(steps)[:count]


@cache
def _flop_formula(func: Any) -> Callable[..., int] | None:
    """The formula of torch.utils.flop_counter, extended by the CPU's attention, which fake tensors use.

    torch takes the weight's gradient of a grouped convolution for that of a dense one.
    """
    packet = getattr(func, "_overloadpacket", func)
    if packet is torch.ops.aten.convolution_backward:
        return _convolution_backward_flops
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    formula: Callable[..., int] | None = flop_registry.get(packet)
    return formula


def _convolution_backward_flops(gradient: Tensor, x: Tensor, weight: Tensor, *others: Any, out_val: Any) -> int:
    """Each gradient, of the input and of the weight, takes the multiplications of the forward pass."""
    transposed, mask = others[4], others[7]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(gradient.shape), transposed)
    return forward * sum(mask[:2])


def module_bytes(module: nn.Module | None, itemsize: int | None = None) -> int:
    """Bytes of a module's parameters and buffers in the allocator's blocks; shared tensors count once.

    Args:
        itemsize: bytes per element after a cast; by default those of each tensor.
    """
    if module is None:
        return 0
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(rounded(t.numel() * (itemsize or t.element_size())) for t in tensors.values())
