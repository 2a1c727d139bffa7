"""Frozen modules that are too large to lie whole on every rank.

Each of their layers is gathered for its call and let go of behind it, so all ranks must call them equally often.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mobius_train.engine.mesh import make_mesh
from mobius_train.job.distributed import Distributed


def text_layers(encoder: nn.Module) -> list[nn.Module]:
    """The layers of a transformer and its embeddings."""
    found: list[nn.Module] = []
    for child in encoder.children():
        layer = isinstance(encoder, nn.ModuleList) or isinstance(child, nn.Embedding)
        found += [child] if layer else text_layers(child)
    return found


class Sharded:
    """A frozen module with some of its modules sharded over all ranks, in place; it computes what it computed before.

    Args:
        parts: modules inside of it, none within another, each called as a whole; the rest stays whole.
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
        """A copy on the CPU that is not sharded. All ranks call it."""
        state = {name: _whole(tensor) for name, tensor in self._module.state_dict().items()}
        whole = copy.deepcopy(self._template)
        whole.load_state_dict(state, assign=True)
        return whole.requires_grad_(False)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
