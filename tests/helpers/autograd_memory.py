"""What a model's autograd graph holds between forward and backward, in one number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mobius_train.measure.graph import leaves_of_graph
from mobius_train.measure.saved import Saved, saved_for_backward
from mobius_train.storages import StorageFollower


class Step(NamedTuple):
    """A forward and a backward pass; all that is read of it needs but one."""

    output: Tensor
    saved: Saved
    leaves: list[Tensor]
    """whose gradients the backward pass computed"""
    forward: float
    """TFLOP"""
    backward: float
    """TFLOP"""

    def branches(self) -> set[str]:
        """The first names of the modules that have saved a tensor, parameters included."""
        return {name.partition(".")[0] for name in self.saved.tensors}


def step(forward: Callable[[], Tensor], model: nn.Module) -> Step:
    """Run both passes; the parameters keep their gradients. Torch counts no fused attention of a CPU."""
    with FlopCounterMode(display=False) as counter:
        output, saved = saved_for_backward(forward, {"": model})
        before = counter.get_total_flops()
        leaves = leaves_of_graph(output)
        output.sum().backward()
    return Step(output, saved, leaves, before / 1e12, (counter.get_total_flops() - before) / 1e12)


def held_for_backward(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that live after `forward` only because the backward pass needs them; parameters do not count."""
    return saved_for_backward(forward, {"": model})[1].total


def result_and_held(forward: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, int]:
    """What `forward` returns, to differentiate, and the bytes of `held_for_backward`."""
    result, saved = saved_for_backward(forward, {"": model})
    return result, saved.total


def watched(features: Iterator[Any], live: StorageFollower) -> Iterator[Any]:
    """The stream itself; `live` follows what computing it makes, and nothing else."""
    while True:
        with live:
            feature = next(features, None)
        if feature is None:
            return
        yield feature
        del feature
