"""Access to a rank's pieces of DeepSpeed's float32 weights and of Adam's moments.

DeepSpeed stores them differently at each ZeRO stage. A piece is a range of a flattened tensor, as a view of the live
state. Other data with the same ranges, such as the moving average, is gathered in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mobius_train.engine.adam_state import AdamState
from mobius_train.engine.pieces import part, whole
from mobius_train.engine.protocol import Piece


def masters_of(engine: Any, trained: dict[str, nn.Parameter], stage: int) -> Masters:
    """Return the masters of a DeepSpeed engine's trained parameters."""
    if stage == 3:
        return _Sharded(engine.optimizer, trained)
    if stage in (1, 2):
        return _Fragmented(engine.optimizer, trained)
    return _Whole(engine.optimizer, trained)


class Masters(ABC):
    """The float32 weights and moments of the trained parameters, as one ZeRO stage shards them."""

    def __init__(self, optimizer: Any, trained: dict[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._trained: dict[str, Any] = dict(trained)

    def adam(self) -> AdamState:
        """Return Adam's moments, for reading and writing."""
        return AdamState(getattr(self._optimizer, "optimizer", self._optimizer))

    def commit(self, adam: AdamState, step: int) -> None:
        """Store the values written to the moments, and set the step count."""
        for key in self._keys():
            adam.commit(key, step)

    @abstractmethod
    def pieces(self, of: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> dict[str, Piece]:
        """Return this rank's pieces of the weights by parameter name, or of other data in the same layout.

        Args:
            of: maps a tensor that Adam steps to the data of the same shape.
        """

    @abstractmethod
    def refresh(self) -> None:
        """Copy the float32 weights, after writing to them, to the weights that compute. All ranks call it."""

    def share(self, piece: Piece) -> Piece:
        """Return the part of a piece that this rank saves, so that every element is saved once."""
        return piece

    def gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather full CPU tensors on every rank from flat tensors with the ranges of `pieces()`. All ranks call it."""
        wholes = {}
        ranges = self.pieces()
        for name, parameter in self._trained.items():
            piece = ranges[name]._replace(data=pieces[name]) if name in ranges else None
            wholes[name] = whole(tuple(_shape(parameter)), piece, parameter.device)
        return wholes

    @property
    def adam_step(self) -> int:
        """Number of Adam steps, equal for all parameters because each has a gradient in every step."""
        adam = self.adam()
        return max((adam.step(key) for key in self._keys()), default=0)

    def _keys(self) -> list[Tensor]:
        """Return the tensors that Adam steps."""
        return [key for group in self._optimizer.param_groups for key in group["params"]]


class _Whole(Masters):
    """Stage 0: full parameters on every rank; under fp16 and bf16, their float32 copies."""

    def __init__(self, optimizer: Any, trained: dict[str, nn.Parameter]) -> None:
        super().__init__(optimizer, trained)
        low = [p for group in getattr(optimizer, "fp16_groups", []) for p in group]
        high = [p for group in getattr(optimizer, "fp32_groups", []) for p in group]
        copies = {id(p): master for p, master in zip(low, high, strict=True)}
        self._masters = {name: copies.get(id(p), p) for name, p in trained.items()}

    def pieces(self, of: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> dict[str, Piece]:
        return {name: Piece(tuple(m.shape), 0, of(m).view(-1)) for name, m in self._masters.items()}

    def refresh(self) -> None:
        for name, parameter in self._trained.items():
            parameter.data.copy_(self._masters[name].data)

    def share(self, piece: Piece) -> Piece:
        return part(piece, dist.get_rank(), dist.get_world_size())

    def gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: piece.view(self._masters[name].shape).to("cpu", copy=True) for name, piece in pieces.items()}


class _Fragmented(Masters):
    """Stages 1 and 2: each rank holds a range of the concatenated parameters, and so fragments of some."""

    def pieces(self, of: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> dict[str, Piece]:
        pieces = {}
        for name, parameter in self._trained.items():
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                address = mapping.hp_fragment_address
                fragment = of(flat).narrow(0, address.start, address.numel)
                pieces[name] = Piece(tuple(parameter.shape), mapping.lp_fragment_address.start, fragment)
        return pieces

    def refresh(self) -> None:
        self._optimizer.update_lp_params()

    def _keys(self) -> list[Tensor]:
        return list(self._optimizer.single_partition_of_fp32_groups)


class _Sharded(Masters):
    """Stage 3: each parameter is split into equal shards, one per rank; the last ones are padded."""

    def pieces(self, of: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> dict[str, Piece]:
        pieces = {}
        for name, parameter in self._trained.items():
            # DeepSpeed's public accessor would copy an offloaded shard to the GPU.
            shard, group = self._optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
            flat = self._optimizer.fp32_partitioned_groups_flat[group]
            offset = shard.storage_offset() - flat.storage_offset()
            start = parameter.ds_tensor.ds_numel * dist.get_rank()
            size = min(len(shard), parameter.ds_numel - start)
            if size > 0:
                pieces[name] = Piece(tuple(parameter.ds_shape), start, of(flat).narrow(0, offset, size))
        return pieces

    def refresh(self) -> None:
        optimizer = self._optimizer
        for number, high in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(high.data)
            optimizer._unflatten_partitioned_parameters(number)
        # Small parameters stay unsharded on every rank.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _keys(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)


def _shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
