"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from mobius_train.config import RunConfig

logger = logging.getLogger(__name__)


def learning_rates(config: RunConfig, world_size: int) -> Callable[[int], float]:
    """Return a function from the step (from 0) to the learning rate of diffusers' schedule.

    With `scale_lr` the rate is multiplied by the samples of a step, as in the Hugging Face scripts.
    """
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        logger.warning(
            "lr_warmup_steps=%d has no effect with lr_scheduler=constant: set lr_scheduler=constant_with_warmup",
            config.lr_warmup_steps,
        )
    base = config.learning_rate
    if config.scale_lr:
        base *= config.samples_per_step(world_size)
    unused = torch.optim.SGD([torch.zeros(1)], lr=base)
    factor = get_scheduler(
        config.lr_scheduler,
        unused,
        num_warmup_steps=config.lr_warmup_steps,
        # Counting from one avoids a rate of 0 in the first and the last step.
        num_training_steps=config.steps + 1,
    ).lr_lambdas[0]
    return lambda step: base * float(factor(step + 1))
