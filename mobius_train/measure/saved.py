"""What the autograd graph holds between forward and backward, to the byte and by module.

Works with real and with fake tensors (FakeTensorMode), with recomputation and with offloading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

# Work that no module does: the loss, a task's own arithmetic.
OUTSIDE = "(outside of modules)"


@dataclass(frozen=True)
class Saved:
    """What is kept for the backward pass.

    Attributes:
        nbytes: by module, the largest first: storages without those of parameters and buffers, each once.
        made: the same bytes by the module that made them, which for recomputation's inputs is often a frozen one.
        tensors: by module, how many times autograd has saved a tensor, parameters included.
    """

    nbytes: dict[str, int]
    made: dict[str, int]
    tensors: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.nbytes.values())


def saved_for_backward(
    forward: Callable[[], Tensor],
    roots: Mapping[str, nn.Module],
    device: torch.device | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Saved]:
    """Run `forward`, whose result does not count, and find out what it leaves for the backward pass.

    A tensor is the innermost module's that ran when autograd saved it. What recomputation keeps is not always seen by
    autograd's hooks (results of selective recomputation never are): it is what else the forward pass has made and not
    freed, and the innermost module's that then ran with gradients enabled.

    Args:
        roots: modules by name; they and all inside are told apart, and their parameters and buffers do not count.
        device: count what lies there only: what is offloaded to host memory is not on the GPU.
        compiled: parts are under torch.compile, which runs its own graphs only where nobody looks at operators and at
            the modules inside: count what autograd's hooks see, by root.
    """
    running = Running()
    live = LiveStorages(running)
    saver: dict[int, str] = {}
    tensors = Counter[str]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        live.follow(storage)
        saver.setdefault(storage._cdata, running.innermost)
        tensors[running.innermost] += 1
        return tensor

    with ExitStack() as stack:
        stack.enter_context(running.watching(roots.items() if compiled else named_modules(roots)))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        if not compiled:
            stack.enter_context(live)
        output = forward()
    ignored = set().union(*map(storages, roots.values()))
    result = output.untyped_storage()._cdata
    nbytes, made = Counter[str](), Counter[str]()
    for key, storage in live.alive().items():
        if key in ignored or (key == result and key not in saver) or device not in (None, storage.device):
            continue
        nbytes[saver.get(key, storage.holder)] += storage.nbytes
        made[storage.maker] += storage.nbytes
    return output, Saved(dict(nbytes.most_common()), dict(made.most_common()), dict(tensors))


def storages(module: nn.Module) -> set[int]:
    """The storages of a module's parameters and buffers."""
    return {tensor.untyped_storage()._cdata for tensor in chain(module.parameters(), module.buffers())}


class Storage(NamedTuple):
    """A storage that lives."""

    nbytes: int
    device: torch.device
    maker: str
    """The module that ran when it was made."""
    holder: str
    """The innermost module that then ran with gradients enabled: whose graph it can be in."""


class Running:
    """The modules whose forward passes run now, one inside the other."""

    def __init__(self) -> None:
        self._stack = [(OUTSIDE, True)]

    @property
    def innermost(self) -> str:
        return self._stack[-1][0]

    @property
    def differentiated(self) -> str:
        """The innermost that was called with gradients enabled."""
        return next(name for name, enabled in reversed(self._stack) if enabled)

    @contextmanager
    def watching(self, modules: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Follow the forward passes of these modules."""
        handles: list[RemovableHandle] = []
        for name, module in modules:
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            # A forward pass may end in an exception that is caught further out.
            handles.append(module.register_forward_hook(self._leaving, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self._stack.append((name, torch.is_grad_enabled()))

    def _leaving(self, *_: object) -> None:
        self._stack.pop()


class LiveStorages(TorchDispatchMode):
    """Follows the storages of all operators' results while it is entered, without keeping them alive."""

    def __init__(self, running: Running | None = None) -> None:
        super().__init__()
        self._running = running or Running()
        # A weak reference keeps the address of a freed storage from being used again.
        self._seen: dict[int, tuple[StorageWeakRef, str, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.follow(leaf.untyped_storage())
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        """Follow one that may have been made before."""
        if storage._cdata not in self._seen:
            running = self._running
            self._seen[storage._cdata] = (StorageWeakRef(storage), running.innermost, running.differentiated)

    def alive(self) -> dict[int, Storage]:
        """Those that still live, by address; sizes as they are now, for an engine may have emptied some."""
        found = {}
        for key, (reference, maker, holder) in self._seen.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                found[key] = Storage(storage.nbytes(), storage.device, maker, holder)
        return found


def named_modules(roots: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, under its first root's name and its own; the root named "" goes by its class."""
    seen: set[nn.Module] = set()
    for root, module in roots.items():
        for name, inner in module.named_modules(memo=seen, prefix=root):
            yield name or type(inner).__name__, inner
