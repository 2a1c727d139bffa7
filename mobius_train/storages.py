"""When the storages of tensors are made and freed, and by which module; for real and for fake tensors.

torch.distributed._tools.mem_tracker.MemTracker follows storages by module as well. It is not enough: it is private,
keeps peaks and snapshots but no time line, and crashes on modules with frozen parameters.
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

# Work outside of all watched modules: the loss, a task's own arithmetic.
OUTSIDE = "(outside of modules)"
NEVER = np.iinfo(np.int64).max


# Compared by identity.
@dataclass(eq=False)
class Storage:
    """The record of one storage.

    Attributes:
        nbytes: its bytes when it was first seen.
        maker: the innermost watched module that ran then.
        holder: the innermost one that was called with gradients enabled: the storage can be in its graph.
        on_host: it is room in host memory, as `models.offload` makes it.
        freed: the time when it was freed.
        completed: the time when it became the complete gradient of a parameter.
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
    """Follows the storages of all operators' results while it is entered, without keeping them alive.

    Attributes:
        made: the storages that operators made, in order. Time is counted in allocations: `made[i]` is made at time i.

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
        """Name the storages that the module makes in its forward passes."""

        def enter(*_: object) -> None:
            self._running.append((name, torch.is_grad_enabled()))

        def leave(*_: object) -> None:
            self._running.pop()

        self._handles.append(module.register_forward_pre_hook(enter))
        # A forward pass can end in an exception that is caught further out, as recomputation's does.
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    @property
    def running(self) -> str:
        """The innermost watched module whose forward pass runs."""
        return self._running[-1][0]

    def follow(self, storage: UntypedStorage, on_host: bool = False) -> Storage:
        """The record of a storage; a storage that is not followed yet is from now on."""
        key = storage._cdata
        if key not in self._followed:
            holder = next(name for name, differentiated in reversed(self._running) if differentiated)
            reference = weakref.ref(storage, lambda _: self._free(key))
            self._followed[key] = Storage(storage.nbytes(), self.running, holder, on_host, reference=reference)
        return self._followed[key]

    def alive(self) -> list[tuple[UntypedStorage, Storage]]:
        """The followed storages that are not freed, with their records."""
        found = ((record.reference(), record) for record in self._followed.values())
        return [(storage, record) for storage, record in found if storage is not None]

    def _free(self, key: int) -> None:
        self._followed.pop(key).freed = len(self.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        new = {storage._cdata: storage for storage in _storages(result) if storage._cdata not in self._followed}
        if new:
            # The result can be a view of a storage that existed before, or such a storage changed in place.
            given = {storage._cdata for storage in _storages((args, kwargs))}
            for key, storage in new.items():
                record = self.follow(storage, _is_host_copy(func, kwargs))
                if key not in given:
                    self.made.append(record)
        return result


def module_storages(module: nn.Module) -> set[int]:
    """The addresses (`UntypedStorage._cdata`) of the storages of a module's parameters and buffers."""
    return {tensor.untyped_storage()._cdata for tensor in chain(module.parameters(), module.buffers())}


def _storages(values: Any) -> Iterator[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _is_host_copy(func: Any, kwargs: dict[str, Any] | None) -> bool:
    """Whether this is room in host memory, as `models.offload` makes it: the device is given by name."""
    return func is torch.ops.aten.empty_like.default and (kwargs or {}).get("device") == torch.device("cpu")
