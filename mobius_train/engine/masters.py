"""Where DeepSpeed keeps the float32 weights and Adam's moments: which pieces of them a rank holds.

DeepSpeed has a way of its own for each ZeRO stage. A piece is a range of a flattened whole, as a view of the live
state; anything else of the same ranges, such as the weights' moving average, is gathered in the same way.
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
    """The masters of a DeepSpeed engine, for its trained parameters by name."""
    if stage == 3:
        return _Sharded(engine.optimizer, trained)
    if stage in (1, 2):
        return _Fragmented(engine.optimizer, trained)
    return _Whole(engine.optimizer, trained)


class Masters(ABC):
    """The float32 weights of the trained parameters and their moments, as one ZeRO stage spreads them over ranks."""

    def __init__(self, optimizer: Any, trained: dict[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._trained: dict[str, Any] = dict(trained)

    def adam(self) -> AdamState:
        """The moments, to be read or written to."""
        return AdamState(getattr(self._optimizer, "optimizer", self._optimizer))

    def commit(self, adam: AdamState, step: int) -> None:
        """Take over what was written into the moments, and how often Adam has stepped."""
        for key in self._keys():
            adam.commit(key, step)

    @abstractmethod
    def pieces(self, of: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> dict[str, Piece]:
        """What this rank holds of the weights by the parameter's name, or of something else that lies as they do.

        Args:
            of: from a tensor that Adam steps to one of its shape.
        """

    @abstractmethod
    def refresh(self) -> None:
        """Make the weights that compute follow the float32 ones, after these were written to. All ranks call it."""

    def share(self, piece: Piece) -> Piece:
        """The part of a piece that this rank saves, so that every element is saved once."""
        return piece

    def gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, on every rank, from flat tensors of the ranges of `pieces`. All ranks call it."""
        wholes = {}
        mine = self.pieces()
        for name, parameter in self._trained.items():
            piece = mine[name]._replace(data=pieces[name]) if name in mine else None
            wholes[name] = whole(tuple(_shape(parameter)), piece, parameter.device)
        return wholes

    @property
    def adam_step(self) -> int:
        """How often Adam has stepped; the same for all parameters, each of which has a gradient in every step."""
        adam = self.adam()
        return max((adam.step(key) for key in self._keys()), default=0)

    def _keys(self) -> list[Tensor]:
        """The tensors that Adam steps."""
        return [key for group in self._optimizer.param_groups for key in group["params"]]


class _Whole(Masters):
    """Stage 0: the parameters themselves, or under fp16 and bf16 their float32 copies; whole on every rank."""

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
    """Stages 1 and 2: a rank has a range of all parameters laid end to end, so a fragment of some of them."""

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
    """Stage 3: every parameter is cut into equal shards, one for each rank, the last ones padded."""

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
        # Small parameters stay whole on every rank.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _keys(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)


def _shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
