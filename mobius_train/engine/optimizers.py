"""AdamW (arXiv 1711.05101) for both engines, optionally with 8-bit moments (arXiv 2110.02861)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from mobius_train.engine.settings import EngineSettings, OptimizerName
from mobius_train.errors import MobiusError


def check_optimizer(settings: EngineSettings) -> None:
    """Check that this machine can run the optimizer.

    Raises:
        MobiusError: bitsandbytes or a CUDA device is missing.
    """
    if settings.optimizer != "adamw_8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MobiusError(
            "optimizer=adamw_8bit needs bitsandbytes, which is not installed: pip install 'bitsandbytes>=0.45',"
            " or set optimizer=adamw"
        )
    if not torch.cuda.is_available():
        raise MobiusError("optimizer=adamw_8bit needs a CUDA device, but none is available: set optimizer=adamw")


def check_offload(optimizer: OptimizerName, offloaded: bool) -> None:
    """Check that the optimizer can be offloaded, if it is.

    Raises:
        MobiusError: the optimizer does not support states in host memory.
    """
    if optimizer == "adamw_8bit" and offloaded:
        raise MobiusError(
            "optimizer=adamw_8bit runs on the GPU, but the optimizer is offloaded to host memory: set optimizer=adamw,"
            " or do not offload"
        )


def make_optimizer(parameters: list[nn.Parameter], settings: EngineSettings) -> Optimizer:
    """Create the optimizer of plain float32 tensors; bitsandbytes does not support DTensors (bitsandbytes#1633)."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.adam_weight_decay,
    }
    if settings.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    # The unfused kernel needs temporary copies of the parameters, and on a CPU it is several times slower.
    return AdamW(parameters, fused=True, **options)
