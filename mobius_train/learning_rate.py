"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from mobius_train.config import RunConfig


def learning_rates(config: RunConfig, world_size: int) -> Callable[[int], float]:
    """step (from 0) → learning rate, by diffusers' schedules.

    With `scale_lr`, times accumulation × batch × ranks, as the Hugging Face scripts do.
    """
    base = config.learning_rate
    if config.scale_lr:
        base *= config.samples_per_step(world_size)
    unused = torch.optim.SGD([torch.zeros(1)], lr=base)
    factor = get_scheduler(
        config.lr_scheduler,
        unused,
        num_warmup_steps=config.lr_warmup_steps,
        # Counted from one, so that the first step is not wasted at a rate of 0, nor the last.
        num_training_steps=config.max_train_steps + 1,
    ).lr_lambdas[0]
    return lambda step: base * float(factor(step + 1))
