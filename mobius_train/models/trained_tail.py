"""Trained copies of a backbone's last blocks, as part of a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


def empty_blocks(last_blocks: Callable[[], Iterable[nn.Module]]) -> nn.ModuleList:
    """Blocks without values, on the default device; their weights are to be loaded.

    Args:
        last_blocks: builds a model, and takes blocks of it. It runs on the meta device: the rest of the model never has
            weights.
    """
    with torch.device("meta"):
        blocks = nn.ModuleList(last_blocks())
    return blocks.to_empty(device=torch.get_default_device())


def parameters_to_buffers(module: nn.Module) -> None:
    """Turn a module's own parameters into buffers, which are saved but never trained."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
