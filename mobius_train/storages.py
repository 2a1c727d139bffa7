"""Tracking of tensor storages: when and by which module they are created and freed, for real and fake tensors.

torch.distributed._tools.mem_tracker.MemTracker also tracks storages by module, but it is private, keeps peaks and
snapshots without a time line, and crashes on modules with frozen parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

# Name for work outside of all watched modules, such as the loss.
OUTSIDE = "(outside of modules)"
NEVER = np.iinfo(np.int64).max
DEVICE = torch.ops.prim.device.default


# Compared by identity.
@dataclass(eq=False)
class Storage:
    """The record of one storage.

    Attributes:
        nbytes: size in bytes when the storage was first seen.
        maker: the innermost watched module running at that time.
        holder: the innermost one called with gradients enabled; its graph can hold the storage.
        on_host: True for host memory allocated by `models.offload`.
        freed: time at which the storage was freed.
        completed: time at which the storage became the complete gradient of a parameter.
        reference: returns the storage, or None once it is freed.
    """

    nbytes: int
    maker: str
    holder: str
    on_host: bool = False
    freed: int = NEVER
    completed: int = NEVER
    reference: Callable[[], UntypedStorage | None] = lambda: None


class StorageFollower(TorchDispatchMode):
    """A mode that tracks the storages of all operators' results, without keeping them alive.

    Attributes:
        made: storages created by operators, in order. Time is counted in allocations: `made[i]` is created at time i.

    Args:
        outside: the name for work outside of all watched modules.
    """

    def __init__(self, outside: str = OUTSIDE) -> None:
        super().__init__()
        self.made: list[Storage] = []
        self._followed: dict[int, Storage] = {}
        self._running = [(outside, True)]
        self._handles: list[RemovableHandle] = []

    def watch(self, module: nn.Module, name: str) -> None:
        """Assign the storages created in the module's forward passes to `name`."""

        def enter(*_: object) -> None:
            self._running.append((name, torch.is_grad_enabled()))

        def leave(*_: object) -> None:
            self._running.pop()

        self._handles.append(module.register_forward_pre_hook(enter))
        # A forward pass can end in an exception that is caught outside, as in recomputation.
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    @property
    def running(self) -> str:
        """Name of the innermost watched module whose forward pass is running."""
        return self._running[-1][0]

    def follow(self, storage: UntypedStorage, on_host: bool = False) -> Storage:
        """Return the record of a storage, and start tracking it if it is new."""
        key = storage._cdata
        if key not in self._followed:
            holder = next(name for name, differentiated in reversed(self._running) if differentiated)
            reference = weakref.ref(storage, lambda _: self._free(key))
            self._followed[key] = Storage(storage.nbytes(), self.running, holder, on_host, reference=reference)
        return self._followed[key]

    def alive(self) -> list[tuple[UntypedStorage, Storage]]:
        """Return the tracked storages that are not freed, with their records."""
        found = ((record.reference(), record) for record in self._followed.values())
        return [(storage, record) for storage, record in found if storage is not None]

    def _free(self, key: int) -> None:
        self._followed.pop(key).freed = len(self.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is DEVICE:
            # Two thirds of all calls on fake tensors ask for a device. They compute nothing.
            return func(*args)
        result = func(*args, **(kwargs or {}))
        self._track(func, args, kwargs, result)
        return result

    def _track(self, func: Any, args: Any, kwargs: dict[str, Any] | None, result: Any) -> None:
        """Start tracking the new storages of an operator's result."""
        new = {storage._cdata: storage for storage in _storages(result) if storage._cdata not in self._followed}
        if new:
            # The result can share an existing storage, as a view or by an in-place operation.
            given = {storage._cdata for storage in _storages((args, kwargs))}
            for key, storage in new.items():
                record = self.follow(storage, _is_host_copy(func, kwargs))
                if key not in given:
                    self.made.append(record)


def module_storages(module: nn.Module) -> set[int]:
    """Return the addresses (`UntypedStorage._cdata`) of a module's parameter and buffer storages."""
    return {tensor.untyped_storage()._cdata for tensor in chain(module.parameters(), module.buffers())}


def _storages(values: Any) -> Iterator[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _is_host_copy(func: Any, kwargs: dict[str, Any] | None) -> bool:
    """True for an allocation of host memory by `models.offload`, which names the device."""
    return func is torch.ops.aten.empty_like.default and (kwargs or {}).get("device") == torch.device("cpu")
