"""Settings for engines of small modules."""

from __future__ import annotations

from typing import Any

from mobius_train.engine.settings import EngineSettings


def settings(**changes: Any) -> EngineSettings:
    """One sample a step in float32, plain AdamW, no average; `changes` replace fields."""
    values: dict[str, Any] = {
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "mixed_precision": "no",
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "adam_weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "use_ema": False,
        "ema_decay": 0.9,
    }
    return EngineSettings(**values | changes)
