"""Where DeepSpeed keeps the float32 weights: which pieces of them a rank holds, and how pieces make wholes.

DeepSpeed has a way of its own for each ZeRO stage. A piece is a view of the live master weights; anything
else of the same shapes, such as their moving average, is gathered in the same way.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Masters(Protocol):
    """The float32 weights of the trained parameters, as one ZeRO stage spreads them over the ranks."""

    def pieces(self) -> dict[str, Tensor]:
        """What this rank holds, by the parameter's name; views of any shape and device."""

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's piece of a tensor of the parameter's shape; of a parameter that `pieces` lists."""

    def gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, on every rank, from every rank's pieces. All ranks call it."""


def masters_of(engine: Any, trained: dict[str, nn.Parameter], stage: int) -> Masters:
    """The masters of a DeepSpeed engine, for its trained parameters by name."""
    if stage == 3:
        return _Sharded(engine.optimizer, trained)
    if stage in (1, 2):
        return _Fragmented(trained)
    return _Whole(engine.optimizer, trained)


class _Whole:
    """Stage 0: the parameters themselves, or under fp16 and bf16 their float32 copies."""

    def __init__(self, optimizer: Any, trained: dict[str, nn.Parameter]) -> None:
        low = [p for group in getattr(optimizer, "fp16_groups", []) for p in group]
        high = [p for group in getattr(optimizer, "fp32_groups", []) for p in group]
        copies = {id(p): master for p, master in zip(low, high, strict=True)}
        self._masters = {name: copies.get(id(p), p) for name, p in trained.items()}

    def pieces(self) -> dict[str, Tensor]:
        return {name: master.detach() for name, master in self._masters.items()}

    def cut(self, name: str, whole: Tensor) -> Tensor:
        return whole

    def gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: piece.to("cpu", copy=True) for name, piece in pieces.items()}


class _Fragmented:
    """Stages 1 and 2: a rank has a range of all parameters laid end to end, so a fragment of some of them."""

    def __init__(self, trained: dict[str, nn.Parameter]) -> None:
        self._trained: dict[str, Any] = dict(trained)

    def pieces(self) -> dict[str, Tensor]:
        mappings = {name: p._hp_mapping for name, p in self._trained.items()}
        return {name: m.get_hp_fragment().detach() for name, m in mappings.items() if m is not None}

    def cut(self, name: str, whole: Tensor) -> Tensor:
        address = self._trained[name]._hp_mapping.lp_fragment_address
        return whole.flatten().narrow(0, address.start, address.numel)

    def gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        wholes = {}
        for name, parameter in self._trained.items():
            whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            if name in pieces:
                self.cut(name, whole).copy_(pieces[name])
            dist.all_reduce(whole)
            wholes[name] = whole.to("cpu", copy=True)
        return wholes


class _Sharded:
    """Stage 3: every parameter is cut into equal shards, one for each rank, the last one padded."""

    def __init__(self, optimizer: Any, trained: dict[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._trained: dict[str, Any] = dict(trained)

    def pieces(self) -> dict[str, Tensor]:
        # DeepSpeed's public accessor would copy an offloaded shard to the GPU.
        shard = self._optimizer._get_fp32_opt_state_partition
        return {name: shard(p, release_swap_buffers=False)[0].detach() for name, p in self._trained.items()}

    def cut(self, name: str, whole: Tensor) -> Tensor:
        size = self._trained[name].ds_tensor.ds_numel
        padded = whole.new_zeros(size * dist.get_world_size())
        padded[: whole.numel()] = whole.flatten()
        return padded.narrow(0, dist.get_rank() * size, size)

    def gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        wholes = {}
        for name, parameter in self._trained.items():
            shard = pieces[name].to(parameter.device)
            shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
            dist.all_gather(shards, shard)
            whole = torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)
            wholes[name] = whole.to("cpu", copy=True)
        return wholes
