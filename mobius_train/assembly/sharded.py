"""Sharding of frozen modules that are too large for a full copy on every rank.

Each layer is gathered for its call and freed afterwards, so all ranks must call it equally often.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mobius_train.engine.mesh import make_mesh
from mobius_train.job.distributed import Distributed


def text_layers(encoder: nn.Module) -> list[nn.Module]:
    """The layers of a transformer and its embeddings, each once: T5 has its embeddings under two names."""
    return list(dict.fromkeys(_layers(encoder)))


def _layers(encoder: nn.Module) -> Iterator[nn.Module]:
    for child in encoder.children():
        if isinstance(encoder, nn.ModuleList) or isinstance(child, nn.Embedding):
            yield child
        else:
            yield from _layers(child)


class Sharded:
    """Shards some submodules of a frozen module over all ranks, in place. The module's results do not change.

    Args:
        parts: submodules to shard, not nested, each run by its own forward call; other submodules stay unsharded.
    """

    def __init__(self, module: nn.Module, parts: list[nn.Module], distributed: Distributed) -> None:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()
        }
        self._module, self._template = module, copy.deepcopy(module, memo)
        mesh = make_mesh(distributed.world_size, distributed.world_size, distributed.device)
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)

    def whole(self) -> nn.Module:
        """An unsharded copy on the CPU. Collective."""
        state = {name: _whole(tensor) for name, tensor in self._module.state_dict().items()}
        whole = copy.deepcopy(self._template)
        whole.load_state_dict(state, assign=True)
        return whole.requires_grad_(False)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
