"""The part of a recipe that an engine needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mobius_train.config import RunConfig

MixedPrecision = Literal["no", "fp16", "bf16"]
OptimizerName = Literal["adamw", "adamw_8bit"]


@dataclass(frozen=True)
class EngineSettings:
    """Settings of an engine, named as in the Hugging Face training scripts.

    Attributes:
        micro_batch_size: samples of one forward pass on one rank.
        max_grad_norm: 0 means no clipping.
        ema_decay: decay of the trained weights' moving average after its warm-up.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    mixed_precision: MixedPrecision
    optimizer: OptimizerName
    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    adam_weight_decay: float
    max_grad_norm: float
    use_ema: bool
    ema_decay: float


def engine_settings(config: RunConfig) -> EngineSettings:
    """Return the engine settings of a recipe."""
    return EngineSettings(
        micro_batch_size=config.train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        adam_weight_decay=config.adam_weight_decay,
        max_grad_norm=config.max_grad_norm,
        use_ema=config.use_ema,
        ema_decay=config.ema_decay,
    )
