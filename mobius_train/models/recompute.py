"""The activations that each unit of the ring (a layer, its entry, its head) stores for the backward pass.

keep       everything that autograd saves
selective  the results of matrix products, convolutions and attention; norms and activations are recomputed
recompute  the unit's inputs; everything else is recomputed
offload    as keep, but in host memory (`offload.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mobius_train.models.offload import Offload

# What a unit computes: a tensor, or a tuple with tensors.
Result = TypeVar("Result")
Treatment = Literal["keep", "selective", "recompute", "offload"]

# Operators whose results the selective treatment saves; they account for nearly all FLOPs.
EXPENSIVE = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::convolution",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
}


@dataclass(frozen=True)
class LayerMemory:
    """The recipe's options that trade memory for time in trained layers.

    Attributes:
        gradient_checkpointing: recompute the layers in the backward pass.
        gradient_checkpointing_kept: share of the layers that are exempt from recomputation.
        recompute_activations: recompute norms and activations in layers that are not recomputed.
        activation_offload: share of the layers whose saved tensors are moved to host memory; they are not recomputed.
    """

    gradient_checkpointing: bool = False
    gradient_checkpointing_kept: float = 0.0
    recompute_activations: bool = False
    activation_offload: float = 0.0

    def treatments(self, costs: Sequence[float]) -> tuple[Treatment, ...]:
        """The treatments of the entry, of each layer in forward order, and of the head.

        With recomputation, the layers of lowest cost are kept, and the next ones are offloaded. Without it, the
        layers of highest cost are offloaded.

        Args:
            costs: saved bytes per FLOP of the forward pass for each layer, up to a common factor.
        """
        kept: Treatment = "selective" if self.recompute_activations else "keep"
        other: Treatment = "recompute" if self.gradient_checkpointing else kept
        treatments = [other] * len(costs)
        ranking = sorted(range(len(costs)), key=costs.__getitem__)
        offloaded = round(self.activation_offload * len(costs))
        if self.gradient_checkpointing:
            keep = round(self.gradient_checkpointing_kept * len(costs))
            for index in ranking[:keep]:
                treatments[index] = kept
            ranking = ranking[keep : keep + offloaded]
        for index in ranking[len(ranking) - offloaded :]:
            treatments[index] = "offload"
        return (other, *treatments, other)


class TreatedUnits:
    """Runs the units of one forward pass in order, each with its treatment."""

    def __init__(self, treatments: Iterable[Treatment]) -> None:
        self._treatments = iter(treatments)
        self._offload: Offload | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of this forward pass that are in host memory now."""
        return 0 if self._offload is None else self._offload.host_bytes

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call `function(*args)` with the next unit's treatment; without gradients, a plain call."""
        treatment = next(self._treatments)
        if treatment == "keep" or not torch.is_grad_enabled():
            return function(*args)
        if treatment == "offload":
            self._offload = self._offload or Offload()
            with self._offload.unit():
                return function(*args)
        # The ring draws no random numbers.
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if treatment == "selective":
            recompute = partial(recompute, context_fn=_selective)
        return recompute(function, *args)


def _selective() -> tuple[Any, Any]:
    results = _Results()
    forward, again = create_selective_checkpoint_contexts(_Policy(results), allow_cache_entry_mutation=True)
    return _both(results, forward), again


@contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


class _Results(TorchDispatchMode):
    """The storages of the results that the expensive operators of one forward pass return."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: set[int] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # As PyTorch's own modes of selective recomputation. Otherwise compiled modules would run uncompiled.
        return True

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if _expensive(operator):
            self._storages.update(storage for leaf in tree_leaves(result) for storage in _storage(leaf))
        return result

    def contain(self, value: Any) -> bool:
        return bool(self._storages.intersection(_storage(value)))


class _Policy:
    """Decides which operators of one forward pass save their results."""

    def __init__(self, results: _Results) -> None:
        self._results = results
        self._decisions: list[CheckpointPolicy] = []
        self._again = iter(self._decisions)

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if context.is_recompute:
            # PyTorch 2.11 asks again in the backward pass, for the same operators in the same order.
            return next(self._again)
        # An in-place operator must not run a second time on a saved result. DeepSpeed's ZeRO-3 linear layer adds its
        # bias in place.
        in_place = isinstance(operator, OpOverload) and operator._schema.is_mutable and args
        saved = _expensive(operator) or (in_place and self._results.contain(args[0]))
        self._decisions.append(CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE)
        return self._decisions[-1]


def _expensive(operator: Any) -> bool:
    return operator.name().partition(".")[0] in EXPENSIVE


def _storage(value: Any) -> tuple[int, ...]:
    return (value.untyped_storage()._cdata,) if isinstance(value, Tensor) else ()
