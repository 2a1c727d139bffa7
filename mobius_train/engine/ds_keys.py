"""Which keys a DeepSpeed JSON may have here: those that do something, and mean what the recipe means."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

# Sections map to the keys that they may hold.
KNOWN: dict[str, set[str] | None] = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": None,
    "gradient_clipping": None,
    "communication_data_type": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "wall_clock_breakdown": None,
    "steps_per_print": None,
    "data_types": {"grad_accum_dtype"},
    "bf16": {"enabled"},
    "fp16": {"enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"},
    "optimizer": {"type", "params"},
    "zero_optimization": {
        "stage",
        "reduce_bucket_size",
        "allgather_bucket_size",
        "overlap_comm",
        "contiguous_gradients",
        "reduce_scatter",
        "allgather_partitions",
        "round_robin_gradients",
        "offload_optimizer",
        "offload_param",
        "sub_group_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    },
}
OPTIMIZER_PARAMS = {"lr", "betas", "eps", "weight_decay", "torch_adam"}
OFFLOAD = {"device", "pin_memory"}
# What "auto" can be resolved for.
AUTO = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
    *(f"optimizer.params.{key}" for key in OPTIMIZER_PARAMS),
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_param.pin_memory",
}
STAGE_3_ONLY = {key for key in KNOWN["zero_optimization"] or () if key.startswith("stage3_")} | {
    "offload_param",
    "sub_group_size",
}


def problems(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a DeepSpeed JSON by itself, one line each."""
    if "scheduler" in config:
        yield "scheduler: the recipe's lr_scheduler and lr_warmup_steps are the schedule, remove this block"
    yield from _unknown({key: value for key, value in config.items() if key != "scheduler"}, set(KNOWN), "")
    for key, known in KNOWN.items():
        if known is None or key not in config:
            continue
        if not isinstance(config[key], dict):
            yield f"{key} must be an object"
            return
        yield from _unknown(config[key], known, f"{key}.")
    for path, value in _leaves(config, ""):
        if value == "auto" and path not in AUTO and not path.startswith("scheduler."):
            yield f'{path}: nothing decides what "auto" means here, give a value'
    yield from _optimizer_problems(config.get("optimizer", {}))
    yield from _zero_problems(config.get("zero_optimization", {}))


def _optimizer_problems(optimizer: dict[str, Any]) -> Iterator[str]:
    if optimizer.get("type", "AdamW") != "AdamW":
        yield f"optimizer.type is {optimizer['type']!r}: it is AdamW, which the recipe's adam_* fields are for"
    yield from _unknown(optimizer.get("params", {}), OPTIMIZER_PARAMS, "optimizer.params.")


def _zero_problems(zero: dict[str, Any]) -> Iterator[str]:
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        yield f"zero_optimization.stage is {stage!r}: it is 0, 1, 2 or 3"
        return
    for key in ("offload_optimizer", "offload_param"):
        if key not in zero:
            continue
        yield from _unknown(zero[key], OFFLOAD, f"zero_optimization.{key}.")
        if zero[key].get("device") != "cpu":
            yield f"zero_optimization.{key}.device is {zero[key].get('device')!r}: it is cpu; else remove {key}"
    if stage < 3:
        for key in sorted(STAGE_3_ONLY & zero.keys()):
            yield f"zero_optimization.{key} does nothing at stage {stage}: remove it, or use stage 3"
    if stage == 0:
        for key in sorted(zero.keys() - STAGE_3_ONLY - {"stage"}):
            yield f"zero_optimization.{key} does nothing at stage 0: remove it, or use stage 1, 2 or 3"


def _unknown(section: dict[str, Any], known: set[str], prefix: str) -> Iterator[str]:
    for key in sorted(section.keys() - known):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        yield f"{prefix}{key} is not supported here: {hint}"


def _leaves(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
