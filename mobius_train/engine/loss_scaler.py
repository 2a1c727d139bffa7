"""Loss scaling under fp16: DeepSpeed's scaler for other engines too, which makes its state portable."""

from __future__ import annotations

from typing import Any

from mobius_train.engine.protocol import Scalars

# The scaler's state. At stage 0 DeepSpeed's scaler has no hysteresis.
_ATTRIBUTES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def make_loss_scaler(initial_scale_power: int) -> Any:
    """Create a scaler with the settings of ds_configs/."""
    # These imports take seconds, which FSDP in other precisions does not need.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from mobius_train.engine import deepspeed_setup

    deepspeed_setup.join()
    return DynamicLossScaler(
        init_scale=2.0**initial_scale_power,
        scale_window=1000,
        min_scale=1,
        delayed_shift=2,
        consecutive_hysteresis=False,
        # The training loop counts skipped steps and ends the run.
        raise_error_at_min_scale=False,
    )


def scalars_of(scaler: Any) -> Scalars:
    """The state of a scaler; None has no state."""
    return {name: getattr(scaler, name) for name in _ATTRIBUTES if hasattr(scaler, name)}


def restore(scaler: Any, scalars: Scalars) -> None:
    """Restore the state that `scalars_of` returned, of what this scaler has of it."""
    for name in _ATTRIBUTES:
        if hasattr(scaler, name) and name in scalars:
            setattr(scaler, name, scalars[name])
