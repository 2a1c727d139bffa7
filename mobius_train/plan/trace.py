"""Which storages live when, while a program runs on fake or real tensors.

Time is counted in allocations: storage i is made at time i, and lives until its death, which it does not reach.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

Bytes = NDArray[np.int64]

# CUDA's caching allocator hands out multiples of this (kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp).
BLOCK = 512
NEVER = np.iinfo(np.int64).max


def rounded(nbytes: int) -> int:
    """The bytes that CUDA's allocator takes for a tensor of so many."""
    return -(-nbytes // BLOCK) * BLOCK


@dataclass(frozen=True)
class Trace:
    """The storages of a run, in the order in which they were made, but for those that existed before it.

    Attributes:
        sizes: bytes, in the allocator's blocks.
        labels: the part of the program that made each.
        deaths: when it was freed.
        completed: when it became the gradient of a parameter; NEVER for most.
        marks: moments by name.
        entered: when each of the watched units was first called; NEVER for one that was not.
        left: when the gradients of all its parameters were complete.
        host: bytes at the peak of what was copied to host memory, which counts nowhere else.
        flops: floating point operations of matrix products, convolutions and attention, a product and a sum as two.
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
        """Bytes alive at each moment, complete gradients apart."""
        return self._curve(np.arange(len(self.sizes)), np.minimum(self.deaths, self.completed))

    def gradients(self) -> Bytes:
        """Bytes of complete gradients at each moment."""
        return self._curve(np.minimum(self.completed, self.deaths), self.deaths)

    def saved(self, mark: str = "forward") -> dict[str, int]:
        """Bytes by label that outlive the mark: at the end of the forward pass, what the backward pass needs."""
        return self._by_label(self._alive(self.marks[mark]))

    def at(self, time: int, mark: str = "forward") -> tuple[dict[str, int], int]:
        """Bytes alive at a moment, gradients apart: those that outlive the mark by label, and all others."""
        alive = self._alive(time) & (self.completed > time)
        saved = alive & self._alive(self.marks[mark])
        return self._by_label(saved), int(self.sizes[alive & ~saved].sum())

    @property
    def peak(self) -> int:
        """The most that was alive at once, gradients included."""
        return int((self.activations() + self.gradients()).max(initial=0))

    def _alive(self, time: int) -> NDArray[np.bool_]:
        return (np.arange(len(self.sizes)) <= time) & (self.deaths > time)

    def _by_label(self, chosen: NDArray[np.bool_]) -> dict[str, int]:
        sums: dict[str, int] = {}
        for index in np.flatnonzero(chosen):
            sums[self.labels[index]] = sums.get(self.labels[index], 0) + int(self.sizes[index])
        return {label: size for label, size in sums.items() if size}

    def _curve(self, starts: Bytes, ends: Bytes) -> Bytes:
        count = len(self.sizes)
        steps = np.zeros(count + 1, dtype=np.int64)
        np.add.at(steps, np.minimum(starts, count), self.sizes)
        np.subtract.at(steps, np.minimum(ends, count), self.sizes)
        return np.cumsum(steps)[:count]


class Recorder(TorchDispatchMode):
    """Traces the storages that operators make while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._labels = ["other"]
        self._index: dict[int, int] = {}
        self._sizes: list[int] = []
        self._made_by: list[str] = []
        self._deaths: dict[int, int] = {}
        self._completed: dict[int, int] = {}
        self._marks: dict[str, int] = {}
        self._flops: dict[str, int] = {}
        self._phase = "forward"
        self._entered: list[int] = []
        self._left: list[int] = []
        self._host = self._host_peak = 0
        self._handles: list[RemovableHandle] = []

    def watch(self, module: nn.Module, label: str) -> None:
        """Whatever the module makes in its forward pass gets this label."""
        self._handles.append(module.register_forward_pre_hook(lambda *_: self._labels.append(label)))
        # Recomputation leaves a forward pass by an exception, once it has all that it needs.
        self._handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))

    def _leave(self) -> None:
        self._labels.pop()

    def watch_gradients(self, module: nn.Module) -> None:
        """A gradient of the module's parameters counts as one from when it is complete."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._complete))

    def watch_unit(self, modules: list[nn.Module]) -> None:
        """Modules that run one after the other: when they are called first, and when their gradients are complete."""
        unit = len(self._entered)
        self._entered.append(NEVER)
        self._left.append(NEVER)

        def enter(*_: object) -> None:
            self._entered[unit] = min(self._entered[unit], len(self._sizes))

        def leave(_: Tensor) -> None:
            # The last parameter's stands.
            self._left[unit] = len(self._sizes)

        for module in modules:
            self._handles.append(module.register_forward_pre_hook(enter))
            for parameter in module.parameters():
                if parameter.requires_grad:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(leave))

    def close(self) -> None:
        """Let go of the modules and parameters that it watches."""
        for handle in self._handles:
            handle.remove()

    def mark(self, name: str, next_phase: str = "backward") -> None:
        """Name this moment; floating point operations count for another phase from now on."""
        # An allocation of nothing: what was freed before it is gone at this moment.
        self._marks[name] = len(self._sizes)
        self._sizes.append(0)
        self._made_by.append(name)
        self._phase = next_phase

    def trace(self) -> Trace:
        """What was seen so far."""
        count = len(self._sizes)

        def times(found: dict[int, int]) -> Bytes:
            return np.array([found.get(index, NEVER) for index in range(count)], dtype=np.int64)

        return Trace(
            np.array(self._sizes, dtype=np.int64),
            list(self._made_by),
            times(self._deaths),
            times(self._completed),
            dict(self._marks),
            dict(self._flops),
            np.array(self._entered, dtype=np.int64),
            np.array(self._left, dtype=np.int64),
            self._host_peak,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and self._is_new(leaf)]
        if new:
            # A view, or a tensor changed in place, of a storage that existed before.
            given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for leaf in new:
                if id(leaf.untyped_storage()) not in given:
                    if _is_host_copy(func, kwargs):
                        self._made_on_host(leaf.untyped_storage())
                    else:
                        self._made(leaf.untyped_storage())
        count = _flop_formula(func)
        if count is not None:
            flops = count(*args, **(kwargs or {}), out_val=result)
            self._flops[self._phase] = self._flops.get(self._phase, 0) + int(flops)
        return result

    def _is_new(self, tensor: Tensor) -> bool:
        return id(tensor.untyped_storage()) not in self._index

    def _made(self, storage: torch.UntypedStorage) -> None:
        index = self._index[id(storage)] = len(self._sizes)
        self._sizes.append(rounded(storage.nbytes()))
        self._made_by.append(self._labels[-1])
        weakref.finalize(storage, self._freed, id(storage), index).atexit = False

    def _made_on_host(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._host += size
        self._host_peak = max(self._host_peak, self._host)
        weakref.finalize(storage, self._freed_on_host, size).atexit = False

    def _freed_on_host(self, size: int) -> None:
        self._host -= size

    def _freed(self, key: int, index: int) -> None:
        del self._index[key]
        self._deaths[index] = len(self._sizes)

    def _complete(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        index = self._index.get(id(parameter.grad.untyped_storage()))
        if index is not None:
            self._completed.setdefault(index, len(self._sizes))


def _is_host_copy(func: Any, kwargs: dict[str, Any] | None) -> bool:
    """Whether this is room in host memory, as `models.offload` makes it: the device is asked for by name."""
    return func is torch.ops.aten.empty_like.default and (kwargs or {}).get("device") == torch.device("cpu")


def _flop_formula(func: Any) -> Callable[..., int] | None:
    """The formula of torch.utils.flop_counter; it has none for the CPU's attention, which fake tensors run."""
    packet = getattr(func, "_overloadpacket", func)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    formula: Callable[..., int] | None = flop_registry.get(packet)
    return formula


def module_bytes(module: nn.Module | None, itemsize: int | None = None) -> int:
    """Bytes of a module's parameters and buffers in the allocator's blocks, shared ones once.

    Args:
        itemsize: bytes of an element, where the module is going to be cast.
    """
    if module is None:
        return 0
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(rounded(t.numel() * (itemsize or t.element_size())) for t in tensors.values())
