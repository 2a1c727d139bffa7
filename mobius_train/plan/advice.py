"""Changes that make a recipe fit, in order of increasing cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobius_train.bars import DELAY, progress
from mobius_train.config import RunConfig
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.plan.gpus import Gpu
from mobius_train.plan.planner import Plan, Planner
from mobius_train.recipe_files import validated

Variant = tuple[RunConfig, Spread]


@dataclass(frozen=True)
class Change:
    """A change of a recipe, of its DeepSpeed configuration or of the engine.

    Attributes:
        setting: the setting as the user writes it.
        cost: the disadvantage of the change.
        apply: returns the changed variant; None if the change is already made or not possible.
    """

    setting: str
    cost: str
    apply: Callable[[RunConfig, Spread, Gpu], Variant | None]


@dataclass(frozen=True)
class Advice:
    """A change, with the peak for this change alone and for all changes up to it, in bytes."""

    setting: str
    cost: str
    alone: int
    together: int
    fits_alone: bool
    fits_together: bool


def advise(planner: Planner, config: RunConfig, spread: Spread, gpu: Gpu) -> list[Advice]:
    """List memory-saving changes by increasing cost until all of them together fit the GPU."""
    least = planner.plan(config, spread, gpu).peak
    advice: list[Advice] = []
    variant = (config, spread)
    for change in progress(CHANGES, desc="planning changes", unit="change", delay=DELAY):
        alone = _tried(planner, change, (config, spread), gpu)
        following = _tried(planner, change, variant, gpu)
        if alone is None or following is None or following[1].peak >= least:
            continue
        variant, plan = following
        least = plan.peak
        setting = change.setting.format(half=gpu.half_precision)
        advice.append(Advice(setting, change.cost, alone[1].peak, plan.peak, alone[1].fits, plan.fits))
        if plan.fits:
            break
    return advice


def _tried(planner: Planner, change: Change, variant: Variant, gpu: Gpu) -> tuple[Variant, Plan] | None:
    try:
        changed = change.apply(*variant, gpu)
        return None if changed is None else (changed, planner.plan(*changed, gpu))
    except MobiusError:
        return None


def _recipe(config: RunConfig, **changes: Any) -> RunConfig:
    """The changed recipe.

    Raises:
        MobiusError: it does not allow the change.
    """
    return validated(RunConfig, config.model_copy(update=changes).model_dump(), "the changed recipe")


def _sdpa(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    return (_recipe(config, attention_backend="auto"), spread) if config.attention_backend == "eager" else None


def _half(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    if config.mixed_precision != "no" or spread.engine == "ddp":
        return None
    return _recipe(config, mixed_precision=gpu.half_precision), spread


def _zero(stage: int) -> Callable[[RunConfig, Spread, Gpu], Variant | None]:
    def apply(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
        now = _stage(spread)
        # Stages 1 and 2 avoid unsharded float32 gradients in the step, even on a single rank.
        if spread.engine != "deepspeed" or now >= stage or (spread.ranks == 1 and stage > 2):
            return None
        return config, _with_zero(spread, {"stage": stage})

    return apply


def _single_clips(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    batch = config.train_batch_size
    if batch == 1:
        return None
    accumulation = config.gradient_accumulation_steps * batch
    return _recipe(config, train_batch_size=1, gradient_accumulation_steps=accumulation), spread


def _checkpointing(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    if config.gradient_checkpointing:
        return None
    return _recipe(config, gradient_checkpointing=True, recompute_activations=False), spread


def _cheap_recomputation(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    ring = config.stage == "text-to-video" and config.mode == "parallel"
    if not ring or config.recompute_activations or config.gradient_checkpointing or config.compile:
        return None
    return _recipe(config, recompute_activations=True), spread


def _int8(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    return None if config.frozen_int8 else (_recipe(config, frozen_int8=True), spread)


def _parallel(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    if config.stage != "text-to-video" or config.mode == "parallel":
        return None
    return _recipe(config, mode="parallel"), spread


def _cached(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    # Autoencoders train on pixels, not on cached latents.
    if config.stage == "autoencoder" or config.data.cache_dir is not None:
        return None
    data = config.data.model_copy(update={"cache_dir": Path("cache")})
    return _recipe(config, data=data), spread


def _filled(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    if config.data.cache_dir is None or config.data.cache_required:
        return None
    return _recipe(config, data=config.data.model_copy(update={"cache_required": True})), spread


def _eight_bit(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    if config.optimizer == "adamw_8bit" or spread.engine == "ddp":
        return None
    return _recipe(config, optimizer="adamw_8bit"), spread


def _fsdp(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    if spread.engine != "deepspeed":
        return None
    return config, replace(spread, engine="fsdp", ds_json=None)


def _shard_frozen(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    if config.shard_frozen or spread.ranks == 1 or config.stage == "autoencoder" or spread.engine == "ddp":
        return None
    return _recipe(config, shard_frozen=True), spread


def _offload(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    zero = (spread.ds_json or {}).get("zero_optimization", {})
    if spread.engine != "deepspeed" or "offload_optimizer" in zero:
        return None
    stage = max(_stage(spread), 2)
    offload = {"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    return _recipe(config, optimizer="adamw"), _with_zero(spread, offload)


def _offload_shards(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    if spread.engine != "fsdp" or config.fsdp.cpu_offload:
        return None
    fsdp = config.fsdp.model_copy(update={"cpu_offload": True})
    return _recipe(config, fsdp=fsdp, optimizer="adamw"), spread


def _offload_weights(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    zero = (spread.ds_json or {}).get("zero_optimization", {})
    if spread.engine != "deepspeed" or "offload_param" in zero:
        return None
    device = {"device": "cpu", "pin_memory": True}
    offload = {"stage": 3, "offload_optimizer": device, "offload_param": device}
    return _recipe(config, optimizer="adamw"), _with_zero(spread, offload)


def _half_resolution(config: RunConfig, spread: Spread, gpu: Gpu) -> Variant | None:
    if config.data.buckets:
        return None
    data = config.data.model_copy(update={"resolution": config.data.resolution // 2})
    return (_recipe(config, data=data), spread) if data.resolution % 64 == 0 else None


def _stage(spread: Spread) -> int:
    return int((spread.ds_json or {}).get("zero_optimization", {}).get("stage", 0))


def _with_zero(spread: Spread, zero: dict[str, Any]) -> Spread:
    # Keep only offload options: options without effect at the new stage are rejected.
    kept = {k: v for k, v in (spread.ds_json or {}).get("zero_optimization", {}).items() if k.startswith("offload")}
    return replace(spread, ds_json=(spread.ds_json or {}) | {"zero_optimization": kept | zero})


CHANGES = (
    Change("attention_backend=auto", "none: faster", _sdpa),
    Change("mixed_precision={half}", "none: faster; float32 master weights stay", _half),
    Change("ZeRO-1 (ds_configs/zero1.json)", "communication of the weights after a step", _zero(1)),
    Change("ZeRO-2 (ds_configs/zero2.json)", "gradients sent with every micro-batch", _zero(2)),
    Change("recompute_activations=true", "norms and activation functions once more", _cheap_recomputation),
    Change("data.cache_dir=…", "disk space; the clips encoded before the first step", _cached),
    Change("data.cache_required=true", "tools/cache_latents.py in a job of its own, before this one", _filled),
    Change("--engine fsdp", "none but weights gathered in every pass", _fsdp),
    Change("optimizer=adamw_8bit", "bitsandbytes; moments of 8 bits, blocks of 256", _eight_bit),
    Change("train_batch_size=1 with more gradient_accumulation_steps", "smaller kernels, the same sums", _single_clips),
    Change("gradient_checkpointing=true", "the trained layers' forward pass once more", _checkpointing),
    Change("frozen_int8=true", "frozen weights of 8 bits, changed by one percent", _int8),
    Change("mode=parallel", "another model: the ring", _parallel),
    Change("ZeRO-3 (ds_configs/zero3.json)", "weights gathered in every pass", _zero(3)),
    Change("shard_frozen=true", "frozen layers gathered in every pass", _shard_frozen),
    Change("offload_optimizer (ds_configs/zero2_offload.json)", "AdamW on the CPU, in host memory", _offload),
    Change(
        "offload_param (ds_configs/zero3_offload.json)", "weights sent from the host in every pass", _offload_weights
    ),
    Change("fsdp.cpu_offload=true", "AdamW on the CPU, weights sent from the host in every pass", _offload_shards),
    Change("half of data.resolution", "another task: a quarter of the pixels", _half_resolution),
)
