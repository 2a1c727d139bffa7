"""Measure the bytes that the autograd graph holds between forward and backward pass, by module.

Works on real and on fake tensors (FakeTensorMode), with recomputation and with offloading.
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
    """The storages saved for the backward pass.

    Attributes:
        nbytes: bytes by module, the largest first. Each storage counts once; those of parameters and buffers do not.
        made: the same bytes by the module that made them. A frozen module often makes the inputs of recomputation.
        tensors: number of tensors that autograd saved, by module, including parameters.
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
    """Run `forward` and count the bytes that it saves for the backward pass, without its result.

    A storage that autograd saves belongs to the innermost module that runs at that moment. Autograd's hooks do not see
    everything that recomputation keeps (never the results of selective recomputation). Every other storage that lives
    after the forward pass therefore counts too, and belongs to the innermost module that was called with gradients
    enabled and ran when it was made.

    Args:
        forward: returns the loss, or another tensor to differentiate.
        roots: modules by name. They and all modules inside are distinguished; their parameters and buffers do not
            count.
        device: count only storages on this device: tensors offloaded to host memory are not on the GPU.
        compiled: parts of the model are under torch.compile, which does not run its own graphs under a dispatch mode or
            with hooks on inner modules: count only what autograd's hooks see, by root.

    Returns:
        The result of `forward`, and the bytes.
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
        # The current size: an engine may have emptied a storage. Recomputation saves an empty tensor of its own.
        if size := storage.nbytes():
            nbytes[saver.get(record, record.holder)] += size
            made[record.maker] += size
    return output, Saved(dict(nbytes.most_common()), dict(made.most_common()), dict(tensors))


def named_modules(roots: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, named by its first root and its path inside; a root "" has its class name."""
    seen: set[nn.Module] = set()
    for root, module in roots.items():
        for name, inner in module.named_modules(memo=seen, prefix=root):
            yield name or type(inner).__name__, inner
