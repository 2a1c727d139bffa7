"""What the autograd graph holds between forward and backward, to the byte and by module.

Works with real and with fake tensors (FakeTensorMode), with recomputation and with offloading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mobius_train.storages import Storage, StorageFollower, module_storages


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
    live = StorageFollower()
    saver: dict[Storage, str] = {}
    tensors = Counter[str]()

    def pack(tensor: Tensor) -> Tensor:
        saver.setdefault(live.follow(tensor.untyped_storage()), live.running)
        tensors[live.running] += 1
        return tensor

    with ExitStack() as stack:
        stack.callback(live.close)
        for name, module in roots.items() if compiled else named_modules(roots):
            live.watch(module, name)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        if not compiled:
            stack.enter_context(live)
        output = forward()
    ignored = set().union(*map(module_storages, roots.values()))
    result = output.untyped_storage()._cdata
    nbytes, made = Counter[str](), Counter[str]()
    for storage, record in live.alive():
        key = storage._cdata
        if key in ignored or (key == result and record not in saver) or device not in (None, storage.device):
            continue
        # The size as it is now: an engine can have emptied a storage.
        nbytes[saver.get(record, record.holder)] += storage.nbytes()
        made[record.maker] += storage.nbytes()
    return output, Saved(dict(nbytes.most_common()), dict(made.most_common()), dict(tensors))


def named_modules(roots: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, under its first root's name and its own; the root named "" goes by its class."""
    seen: set[nn.Module] = set()
    for root, module in roots.items():
        for name, inner in module.named_modules(memo=seen, prefix=root):
            yield name or type(inner).__name__, inner
