"""The DeepSpeed JSON: "auto" resolved from the recipe, contradictions refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mobius_train.engine import ds_keys
from mobius_train.engine.settings import EngineSettings
from mobius_train.errors import MobiusError

AUTO = "auto"


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
    """The JSON with all that the recipe decides; what the model decides is left to `with_bucket_sizes`.

    Raises:
        MobiusError: something in it contradicts the recipe or itself; all contradictions are listed.
    """
    config: dict[str, Any] = copy.deepcopy(ds_json)
    problems = list(ds_keys.problems(config))
    if not problems:
        problems = list(_settle(config, settings, world_size))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise MobiusError(f"the DeepSpeed configuration does not fit the recipe:\n{listed}")
    return config


def _settle(config: dict[str, Any], settings: EngineSettings, world_size: int) -> Iterator[str]:
    """Fill in what is "auto" or missing; yields where the JSON says otherwise than the recipe."""
    micro, accumulation = settings.micro_batch_size, settings.gradient_accumulation_steps
    product = f"train_batch_size {micro} x accumulation {accumulation} x {world_size} rank(s)"
    precision = f"mixed_precision={settings.mixed_precision}"
    optimizer = config.setdefault("optimizer", {"type": "AdamW"}).setdefault("params", {})
    wanted: list[tuple[dict[str, Any], str, str, Any, str]] = [
        (config, "", "train_micro_batch_size_per_gpu", micro, f"train_batch_size={micro}"),
        (config, "", "gradient_accumulation_steps", accumulation, f"{accumulation}"),
        (config, "", "train_batch_size", micro * accumulation * world_size, product),
        (config, "", "gradient_clipping", settings.max_grad_norm, f"max_grad_norm={settings.max_grad_norm}"),
        (config.setdefault("bf16", {}), "bf16.", "enabled", settings.mixed_precision == "bf16", precision),
        (config.setdefault("fp16", {}), "fp16.", "enabled", settings.mixed_precision == "fp16", precision),
    ]
    for key, value in (
        ("lr", settings.learning_rate),
        ("betas", [settings.adam_beta1, settings.adam_beta2]),
        ("eps", settings.adam_epsilon),
        ("weight_decay", settings.adam_weight_decay),
    ):
        wanted.append((optimizer, "optimizer.params.", key, value, f"{value}"))
    for section, prefix, key, value, source in wanted:
        if section.get(key, AUTO) == AUTO:
            section[key] = value
        elif section[key] != value:
            yield f"{prefix}{key} is {json.dumps(section[key])}, but the recipe has {source}: make them agree"
    config.setdefault("steps_per_print", None)


def with_bucket_sizes(config: dict[str, Any], total: int) -> dict[str, Any]:
    """A copy of a resolved configuration with what the model and the machine decide.

    Buckets hold at most 50M elements, so that they stay small beside the model (DeepSpeed's own defaults take
    1 GB each in 16 bits), and no more than all gradients together.

    Args:
        config: of `resolve`.
        total: the number of trained parameters.
    """
    config = copy.deepcopy(config)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    bucket = min(50_000_000, total)
    sizes = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": min(200_000_000, total),
        "stage3_prefetch_bucket_size": bucket,
        # Norms and biases stay on every rank, as long as they are few beside the rest.
        "stage3_param_persistence_threshold": min(100_000, total // 1000),
    }
    for key, value in sizes.items():
        if zero.get(key) == AUTO:
            zero[key] = value
    for offload in ("offload_optimizer", "offload_param"):
        if zero.get(offload, {}).get("pin_memory") == AUTO:
            zero[offload]["pin_memory"] = torch.cuda.is_available()
    # torch's AdamW needs no compiler, and is the same everywhere.
    if config["optimizer"]["params"].get("torch_adam", AUTO) == AUTO:
        config["optimizer"]["params"]["torch_adam"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    return config
