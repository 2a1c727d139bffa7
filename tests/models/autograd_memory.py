"""What the autograd graph holds between forward and backward; works with real and with fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(module: nn.Module) -> set[int]:
    """The storages of a module's parameters."""
    return {parameter.untyped_storage()._cdata for parameter in module.parameters()}


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Collects the storages that autograd saves for the backward pass."""

    def __init__(self) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self.nbytes: dict[int, int] = {}
        # Storages are known by their address, so none may be freed and its address used again.
        self._alive: list[Tensor] = []

    def __enter__(self) -> SavedTensors:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.nbytes[storage._cdata] = storage.nbytes()
        self._alive.append(tensor)
        return tensor


class LiveStorages(TorchDispatchMode):
    """Follows the storages of all operators' results while it is entered.

    Sees what hooks for saved tensors do not: the inputs that checkpointing keeps in closures.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> dict[int, int]:
        """Bytes of the storages that still live, by storage."""
        return {key: size for key, (reference, size) in self._seen.items() if not reference.expired()}


def held_for_backward(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that live after `forward` only because the backward pass needs them; parameters do not count."""
    with LiveStorages() as live:
        output = forward()
    parameters = storages(model) | {output.untyped_storage()._cdata}
    return sum(size for key, size in live.alive().items() if key not in parameters)


def leaves_of_graph(output: Tensor) -> list[Tensor]:
    """The tensors whose gradient a backward pass from `output` would compute."""
    seen, stack, leaves = set(), [output.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(following for following, _ in node.next_functions)
    return leaves


def watched(features: Iterator[Any], live: LiveStorages) -> Iterator[Any]:
    """The stream itself; `live` follows what computing it makes, and nothing else."""
    while True:
        with live:
            feature = next(features, None)
        if feature is None:
            return
        yield feature
        del feature
