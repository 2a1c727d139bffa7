"""The DeepSpeed JSON: resolves "auto" from the recipe and reports contradictions by key."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mobius_train.engine.ds_keys import (
    ADAMW,
    BF16,
    BUCKETS,
    FP16,
    OFFLOAD,
    OPTIMIZER,
    REMEDIES,
    TOP_LEVEL,
    ZERO,
)
from mobius_train.engine.settings import EngineSettings
from mobius_train.errors import MobiusError
from mobius_train.files import read_small_json

# Elements. Larger communication buckets are no faster, and DeepSpeed allocates each in full, some twice.
LARGEST_BUCKET = 50_000_000


def read_ds_json(path: Path) -> dict[str, Any]:
    """Read the JSON unchanged.

    Raises:
        MobiusError: the file cannot be read, or is not a JSON object.
    """
    try:
        values = read_small_json(path)
    except OSError as error:
        raise MobiusError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise MobiusError(f"the DeepSpeed configuration {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise MobiusError(f"the DeepSpeed configuration {path} must be a JSON object, not a {kind}")
    return values


def resolve(ds_json: dict[str, Any], settings: EngineSettings, world_size: int) -> dict[str, Any]:
    """Return the configuration for DeepSpeed; missing and "auto" values come from the recipe.

    Bucket sizes stay "auto". `with_bucket_sizes` sets them once the trained module is known.

    Raises:
        MobiusError: keys contradict the recipe or have no effect; the message lists all of them.
    """
    resolver = _Resolver(ds_json, settings, world_size)
    if resolver.problems:
        listed = "\n".join(f"  - {problem}" for problem in resolver.problems)
        raise MobiusError(f"the DeepSpeed configuration does not match the recipe:\n{listed}")
    return resolver.config


def with_bucket_sizes(config: dict[str, Any], trained: int) -> dict[str, Any]:
    """Set the "auto" bucket sizes to the number of trained elements, up to LARGEST_BUCKET.

    Args:
        trained: number of trained elements.
    """
    # DeepSpeed requires even sizes.
    size = min(LARGEST_BUCKET, trained + trained % 2)
    zero = {
        key: size if key in BUCKETS and value == "auto" else value for key, value in config["zero_optimization"].items()
    }
    return config | {"zero_optimization": zero}


class _Resolver:
    """Resolves a copy of the JSON section by section and collects the problems."""

    def __init__(self, ds_json: dict[str, Any], settings: EngineSettings, world_size: int) -> None:
        self.config: dict[str, Any] = copy.deepcopy(ds_json)
        self.settings = settings
        self.problems: list[str] = []
        self._check_keys(self.config, TOP_LEVEL, "")
        self._batch_sizes(world_size)
        self._settle(self.config, "gradient_clipping", settings.max_grad_norm, "the recipe's max_grad_norm")
        self._precision()
        self._optimizer()
        self._zero()
        self._refuse_other_autos(self.config, "")
        self.config.setdefault("steps_per_print", None)

    def _section(self, parent: dict[str, Any], key: str, known: Collection[str], prefix: str = "") -> dict[str, Any]:
        section = parent.setdefault(key, {})
        if not isinstance(section, dict):
            self.problems.append(f"{prefix}{key} is {section!r}, but must be an object")
            return {}
        self._check_keys(section, known, f"{prefix}{key}.")
        return section

    def _check_keys(self, section: dict[str, Any], known: Collection[str], prefix: str) -> None:
        for key in section:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                remedy = REMEDIES.get(prefix + key, f"did you mean {near[0]}?" if near else "remove it")
                self.problems.append(f"{prefix}{key} is not supported: {remedy}")

    def _settle(self, section: dict[str, Any], key: str, value: Any, source: str, prefix: str = "") -> None:
        """Set the key if it is missing or "auto"; any other value must equal `value`."""
        given = section.get(key, "auto")
        if given == "auto":
            section[key] = value
        elif given != value or isinstance(given, bool) != isinstance(value, bool):
            self.problems.append(f"{prefix}{key} is {given!r}, but {source} requires {value!r}")

    def _batch_sizes(self, world_size: int) -> None:
        micro, accumulation = self.settings.micro_batch_size, self.settings.gradient_accumulation_steps
        recipe = f"the recipe's train_batch_size={micro}"
        product = f"{recipe} x gradient_accumulation_steps={accumulation} x {world_size} rank(s)"
        self._settle(self.config, "train_micro_batch_size_per_gpu", micro, recipe)
        self._settle(self.config, "gradient_accumulation_steps", accumulation, "the recipe")
        self._settle(self.config, "train_batch_size", micro * accumulation * world_size, product)

    def _precision(self) -> None:
        bf16 = self._section(self.config, "bf16", BF16)
        fp16 = self._section(self.config, "fp16", FP16)
        if bf16.get("enabled") is True and fp16.get("enabled") is True:
            self.problems.append("bf16.enabled and fp16.enabled are both true: enable one of them")
        precision = self.settings.mixed_precision
        source = f"the recipe's mixed_precision={precision}"
        self._settle(bf16, "enabled", precision == "bf16", source, "bf16.")
        self._settle(fp16, "enabled", precision == "fp16", source, "fp16.")
        # Without it DeepSpeed would apply NaN gradients.
        self._settle(bf16, "check_grad_overflow", True, "the guard against non-finite gradients", "bf16.")

    def _optimizer(self) -> None:
        settings = self.settings
        optimizer = self._section(self.config, "optimizer", OPTIMIZER)
        self._settle(optimizer, "type", "AdamW", "the recipe, with its adam_* fields,", "optimizer.")
        parameters = self._section(optimizer, "params", ADAMW, "optimizer.")
        for key, value, source in (
            ("lr", settings.learning_rate, "the recipe's learning_rate"),
            ("betas", [settings.adam_beta1, settings.adam_beta2], "the recipe's adam_beta1 and adam_beta2"),
            ("eps", settings.adam_epsilon, "the recipe's adam_epsilon"),
            ("weight_decay", settings.adam_weight_decay, "the recipe's adam_weight_decay"),
            # DeepSpeed's own Adam would be compiled on the user's machine at first use.
            ("torch_adam", True, "the engine, which steps torch's AdamW,"),
        ):
            self._settle(parameters, key, value, source, "optimizer.params.")
        self._settle(self.config, "zero_allow_untested_optimizer", True, "the engine")
        self._settle(self.config, "zero_force_ds_cpu_optimizer", False, "the engine, which builds no C++,")

    def _zero(self) -> None:
        zero = self._section(self.config, "zero_optimization", ZERO)
        stage = zero.setdefault("stage", 0)
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            self.problems.append(f"zero_optimization.stage is {stage!r}, but must be 0, 1, 2 or 3")
            return
        for key in ("offload_optimizer", "offload_param"):
            self._offload(zero, key)
        for key in zero:
            stages = ZERO.get(key, (stage,))
            if stage not in stages:
                where = " or ".join(str(other) for other in stages)
                self.problems.append(
                    f"zero_optimization.{key} has no effect at stage {stage}: remove it, or use stage {where}"
                )
        for key in BUCKETS:
            # DeepSpeed's defaults would take gigabytes.
            if stage in ZERO[key]:
                zero.setdefault(key, "auto")

    def _offload(self, zero: dict[str, Any], key: str) -> None:
        if key not in zero:
            return
        device = self._section(zero, key, OFFLOAD, "zero_optimization.").get("device", "none")
        if device == "none":
            del zero[key]
        elif device != "cpu":
            self.problems.append(f"zero_optimization.{key}.device is {device!r}, but must be cpu or none")

    def _refuse_other_autos(self, section: dict[str, Any], prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                self._refuse_other_autos(value, f"{prefix}{key}.")
            elif value == "auto" and key not in BUCKETS:
                self.problems.append(f'{prefix}{key} is "auto", but the recipe has no value for it: set a value')
