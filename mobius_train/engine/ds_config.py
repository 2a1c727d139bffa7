"""The DeepSpeed JSON: "auto" resolved from the recipe, contradictions refused by name."""

from __future__ import annotations

import copy
import difflib
import json
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

# Elements. Larger communication buckets are no faster, and DeepSpeed allocates them whole, some twice.
LARGEST_BUCKET = 50_000_000


def read_ds_json(path: Path) -> dict[str, Any]:
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
        kind = type(values).__name__
        raise MobiusError(f"the DeepSpeed configuration {path} must be a JSON object, not a {kind}")
    return values


def resolve(ds_json: dict[str, Any], settings: EngineSettings, world_size: int) -> dict[str, Any]:
    """The configuration for DeepSpeed: what the JSON leaves out or calls "auto" comes from the recipe.

    Bucket sizes stay "auto"; `with_bucket_sizes` fills them in when the trained module is known.

    Raises:
        MobiusError: something contradicts the recipe, or would do nothing; all such things are listed.
    """
    resolver = _Resolver(ds_json, settings, world_size)
    if resolver.problems:
        listed = "\n".join(f"  - {problem}" for problem in resolver.problems)
        raise MobiusError(f"the DeepSpeed configuration does not go with the recipe:\n{listed}")
    return resolver.config


def with_bucket_sizes(config: dict[str, Any], trained: int) -> dict[str, Any]:
    """A resolved configuration with buckets that hold what is trained, up to a limit.

    Args:
        trained: number of trained elements.
    """
    # DeepSpeed wants even sizes.
    size = min(LARGEST_BUCKET, trained + trained % 2)
    zero = {
        key: size if key in BUCKETS and value == "auto" else value for key, value in config["zero_optimization"].items()
    }
    return config | {"zero_optimization": zero}


class _Resolver:
    """Works through a copy of the JSON section by section, and gathers the problems."""

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
            self.problems.append(f"{prefix}{key} is {section!r}: it must be an object")
            return {}
        self._check_keys(section, known, f"{prefix}{key}.")
        return section

    def _check_keys(self, section: dict[str, Any], known: Collection[str], prefix: str) -> None:
        for key in section:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                remedy = REMEDIES.get(prefix + key, f"did you mean {near[0]}?" if near else "remove it")
                self.problems.append(f"{prefix}{key} is not supported here: {remedy}")

    def _settle(self, section: dict[str, Any], key: str, value: Any, source: str, prefix: str = "") -> None:
        """Fill in what is "auto" or left out; anything else must be the value already."""
        given = section.get(key, "auto")
        if given == "auto":
            section[key] = value
        elif given != value or isinstance(given, bool) != isinstance(value, bool):
            self.problems.append(f"{prefix}{key} is {given!r}, but {source} makes it {value!r}")

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
            self.problems.append("bf16.enabled and fp16.enabled are both true: weights have one dtype")
        precision = self.settings.mixed_precision
        source = f"the recipe's mixed_precision={precision}"
        self._settle(bf16, "enabled", precision == "bf16", source, "bf16.")
        self._settle(fp16, "enabled", precision == "fp16", source, "fp16.")
        # Without it DeepSpeed would apply a NaN.
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
            # DeepSpeed's own Adam is compiled on the user's machine when it is first used.
            ("torch_adam", True, "the engine, which steps torch's AdamW,"),
        ):
            self._settle(parameters, key, value, source, "optimizer.params.")
        self._settle(self.config, "zero_allow_untested_optimizer", True, "the engine")
        self._settle(self.config, "zero_force_ds_cpu_optimizer", False, "the engine, which builds no C++,")

    def _zero(self) -> None:
        zero = self._section(self.config, "zero_optimization", ZERO)
        stage = zero.setdefault("stage", 0)
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            self.problems.append(f"zero_optimization.stage is {stage!r}: it is 0, 1, 2 or 3")
            return
        for key in ("offload_optimizer", "offload_param"):
            self._offload(zero, key)
        for key in zero:
            stages = ZERO.get(key, (stage,))
            if stage not in stages:
                where = " or ".join(str(other) for other in stages)
                self.problems.append(
                    f"zero_optimization.{key} does nothing at stage {stage}: remove it, or use stage {where}"
                )
        for key in BUCKETS:
            # Left out, DeepSpeed's defaults would be gigabytes.
            if stage in ZERO[key]:
                zero.setdefault(key, "auto")

    def _offload(self, zero: dict[str, Any], key: str) -> None:
        if key not in zero:
            return
        device = self._section(zero, key, OFFLOAD, "zero_optimization.").get("device", "none")
        if device == "none":
            del zero[key]
        elif device != "cpu":
            self.problems.append(f"zero_optimization.{key}.device is {device!r}: it is cpu or none")

    def _refuse_other_autos(self, section: dict[str, Any], prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                self._refuse_other_autos(value, f"{prefix}{key}.")
            elif value == "auto" and key not in BUCKETS:
                self.problems.append(f'{prefix}{key} is "auto", which the recipe does not decide: give a value')
