"""Trained copies of a backbone's last blocks, as part of a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mobius_train.models.plain_config import plain_config


def config_of_copies(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a backbone, from which its trained copies are built.

    Copies have no dropout, which frozen blocks never apply: a new model predicts what its backbone predicts, and
    recomputation draws no random numbers.
    """
    plain = plain_config(config)
    return plain | {"dropout": 0.0} if "dropout" in plain else plain


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
