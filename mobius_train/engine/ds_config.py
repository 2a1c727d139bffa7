"""The DeepSpeed JSON: "auto" resolved from the recipe, contradictions refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobius_train.engine.settings import EngineSettings
from mobius_train.errors import MobiusError

# What a JSON may say. The rest of DeepSpeed's options either belong to the recipe or to things not trained here.
KNOWN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "zero_optimization",
    "optimizer",
    "communication_data_type",
    "prescale_gradients",
    "wall_clock_breakdown",
    "steps_per_print",
}
STAGE_3_ONLY = (
    "offload_param",
    "sub_group_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_gather_16bit_weights_on_model_save",
)


def read(path: Path) -> dict[str, Any]:
    """The JSON as it is written.

    Raises:
        MobiusError: no such file, or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MobiusError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise MobiusError(f"the DeepSpeed configuration {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise MobiusError(f"the DeepSpeed configuration {path} must be a JSON object")
    return values


def resolve(ds_json: dict[str, Any], settings: EngineSettings, world_size: int) -> dict[str, Any]:
    """The configuration that DeepSpeed gets.

    Raises:
        MobiusError: something in it contradicts the recipe or itself; all contradictions are listed.
    """
    config: dict[str, Any] = json.loads(json.dumps(ds_json))
    problems = [f"{key}: not supported here" for key in sorted(set(config) - KNOWN - {"scheduler"})]
    if "scheduler" in config:
        problems.append("scheduler: the recipe's lr_scheduler and lr_warmup_steps are the schedule, remove it")

    def settle(section: dict[str, Any], key: str, value: Any, name: str, source: str) -> None:
        if section.get(key, "auto") == "auto":
            section[key] = value
        elif section[key] != value:
            problems.append(f"{name} is {section[key]!r}, but {source} makes it {value!r}")

    accumulation = settings.gradient_accumulation_steps
    settle(
        config,
        "train_micro_batch_size_per_gpu",
        settings.micro_batch_size,
        "train_micro_batch_size_per_gpu",
        "the recipe's train_batch_size",
    )
    settle(config, "gradient_accumulation_steps", accumulation, "gradient_accumulation_steps", "the recipe")
    settle(
        config,
        "train_batch_size",
        settings.micro_batch_size * accumulation * world_size,
        "train_batch_size",
        f"train_batch_size={settings.micro_batch_size} x accumulation {accumulation} x {world_size} rank(s)",
    )
    settle(config, "gradient_clipping", settings.max_grad_norm, "gradient_clipping", "the recipe's max_grad_norm")
    for precision in ("bf16", "fp16"):
        section = config.setdefault(precision, {})
        wanted = settings.mixed_precision == precision
        settle(section, "enabled", wanted, f"{precision}.enabled", "the recipe's mixed_precision")

    optimizer = config.setdefault("optimizer", {"type": "AdamW"})
    if optimizer.get("type") != "AdamW":
        problems.append(f"optimizer.type is {optimizer.get('type')!r}: AdamW is what the recipe's adam_* fields are for")
    parameters = optimizer.setdefault("params", {})
    betas = [settings.adam_beta1, settings.adam_beta2]
    for key, value in (
        ("lr", settings.learning_rate),
        ("betas", betas),
        ("eps", settings.adam_epsilon),
        ("weight_decay", settings.adam_weight_decay),
    ):
        settle(parameters, key, value, f"optimizer.params.{key}", "the recipe")
    # torch's own AdamW: nothing to compile at the first start, the same on a CPU.
    parameters.setdefault("torch_adam", True)

    zero = config.setdefault("zero_optimization", {"stage": 0})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage is {stage!r}: it is 0, 1, 2 or 3")
    elif stage < 3:
        idle = [key for key in STAGE_3_ONLY if key in zero]
        problems += [f"zero_optimization.{key} does nothing at stage {stage}: remove it, or use stage 3" for key in idle]
    if stage == 0 and "offload_optimizer" in zero:
        problems.append("zero_optimization.offload_optimizer does nothing at stage 0: use stage 1, 2 or 3")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise MobiusError(f"the DeepSpeed configuration does not go with the recipe:\n{listed}")
    config["zero_allow_untested_optimizer"] = True
    # DeepSpeed's own CPU Adam is a C++ build on the user's machine.
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", None)
    return config
