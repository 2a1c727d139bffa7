"""Adam with decoupled weight decay (arXiv 1711.05101), for both engines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mobius_train.engine.settings import EngineSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(parameters: list[nn.Parameter], settings: EngineSettings) -> Optimizer:
    """Fused on GPUs, where the usual implementation would need temporary copies of what it steps."""
    return AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.adam_weight_decay,
        fused=True if torch.cuda.is_available() else None,
    )


def state_of(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    """The optimizer's state of a tensor that it steps; torch makes it at the first step, and so would it be then."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else None)
        state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
    return state
