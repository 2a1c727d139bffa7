"""The parts of a recipe that an engine needs."""

from __future__ import annotations

from mobius_train.config import RunConfig
from mobius_train.engine.settings import EngineSettings, FsdpSettings


def engine_settings(config: RunConfig) -> EngineSettings:
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
        seed=config.seed,
        use_ema=config.use_ema,
        ema_decay=config.ema_decay,
    )


def fsdp_settings(config: RunConfig) -> FsdpSettings:
    return FsdpSettings(**config.fsdp.model_dump())
