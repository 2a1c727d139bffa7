"""Loss scaling under fp16 for engines other than DeepSpeed. DeepSpeed's scaler makes its state portable."""

from __future__ import annotations

from typing import Any

# The scaler's state.
ATTRIBUTES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


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
