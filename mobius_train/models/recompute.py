"""The activations that each unit of the ring (a layer, its entry, its head) stores for the backward pass.

keep       everything that autograd saves
selective  the results of matrix products, convolutions and attention; norms and activations are recomputed
recompute  the unit's inputs; everything else is recomputed
offload    as keep, but in host memory (`offload.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
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


def _selective() -> tuple[_Expensive, _Expensive]:
    forward, again = create_selective_checkpoint_contexts(_save, allow_cache_entry_mutation=True)
    return _Expensive(forward), _Expensive(again)


def _save(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


class _Expensive(TorchDispatchMode):
    """Shows the expensive operators, and no others, to a mode of PyTorch that saves or returns their results.

    PyTorch takes an operator that runs in the backward pass alone for an error. But the hooks of ZeRO-3 and FSDP run
    inside of a unit too, and gather weights in the backward pass that were there in the forward pass.

    Args:
        results: saves the results in the forward pass, or returns them in the backward pass.
    """

    def __init__(self, results: TorchDispatchMode) -> None:
        super().__init__()
        self._results = results
        # Of saved results. Weak, so that it frees them, but no other storage gets the address of one.
        self._storages: set[StorageWeakRef] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # As PyTorch's own modes of selective recomputation. Otherwise compiled modules would run uncompiled.
        return True

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.name().partition(".")[0] in EXPENSIVE:
            result = self._results.__torch_dispatch__(operator, types, args, kwargs)
            tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
            self._storages.update(map(_storage, tensors))
            return result
        # An in-place operator must not run a second time on a saved result. DeepSpeed's ZeRO-3 linear layer adds its
        # bias in place.
        in_place = isinstance(operator, OpOverload) and operator._schema.is_mutable and args
        if in_place and isinstance(args[0], Tensor) and _storage(args[0]) in self._storages:
            return self._results.__torch_dispatch__(operator, types, args, kwargs)
        return operator(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
