"""DeepSpeed ZeRO as an engine. What is peculiar to DeepSpeed stays in this file."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobius_train.engine.distributed import Distributed
from mobius_train.engine.ema import ExponentialMovingAverage
from mobius_train.engine.protocol import StepReport
from mobius_train.engine.settings import EngineSettings
from mobius_train.errors import MobiusError

# DeepSpeed tells every option at INFO when an engine starts.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

# Communication buckets above this many elements do not make communication faster.
LARGEST_BUCKET = 500_000_000
TAG = "engine"


class DeepSpeedEngine:
    """ZeRO 0 to 3 over one module.

    Args:
        module: the trained module of a task; only its parameters that require a gradient are optimized.
        ds_config: what `ds_config.resolve` returned.
    """

    def __init__(
        self, module: nn.Module, settings: EngineSettings, ds_config: dict[str, Any], distributed: Distributed
    ) -> None:
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self._trained:
            raise MobiusError("nothing to train: no parameter of the trained module requires a gradient")
        self._stage = int(ds_config["zero_optimization"].get("stage", 0))
        self._accumulation = settings.gradient_accumulation_steps
        self._distributed = distributed
        _check_precision(settings.mixed_precision, distributed.device)
        backend = "nccl" if distributed.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        count = sum(p.numel() for p in self._trained.values())
        self._engine, *_ = deepspeed.initialize(
            model=module.to(distributed.device),
            model_parameters=list(self._trained.values()),
            config=_with_bucket_sizes(ds_config, count),
            dist_init_required=False,
        )
        self._ema = None
        if settings.use_ema:
            self._ema = ExponentialMovingAverage(self._masters(), settings.ema_decay)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> StepReport | None:
        boundary = self._engine.is_gradient_accumulation_boundary()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        plain_norm = self._plain_gradient_norm() if boundary else None
        if plain_norm is not None and not math.isfinite(plain_norm):
            # ZeRO-0 in float32 would apply it. Reduced gradients are the same on all ranks, so all skip.
            for parameter in self._trained.values():
                parameter.grad = None
            # An empty step keeps DeepSpeed's count of micro-batches.
            self._engine.step()
            return StepReport(False, plain_norm, None)
        self._engine.step()
        if not boundary:
            return None
        applied = bool(self._engine.was_step_applied())
        if applied and self._ema is not None:
            self._ema.update(self._masters())
        return StepReport(applied, self._gradient_norm(plain_norm, applied), self._loss_scale())

    def _plain_gradient_norm(self) -> float | None:
        """The norm under ZeRO-0 in float32, where DeepSpeed has no optimizer of its own."""
        if self._stage > 0 or self._low_precision():
            return None
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _gradient_norm(self, plain_norm: float | None, applied: bool) -> float:
        if plain_norm is not None:
            return plain_norm
        norm = self._engine.get_global_grad_norm()
        # After a skipped step DeepSpeed still has the norm of the step before.
        return float(norm) if applied and norm is not None else math.nan

    def _low_precision(self) -> bool:
        return bool(self._engine.fp16_enabled() or self._engine.bfloat16_enabled())

    def _loss_scale(self) -> float | None:
        return float(self._engine.optimizer.cur_scale) if self._engine.fp16_enabled() and self._stage == 0 else (
            float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else None
        )

    def _masters(self) -> dict[str, Tensor]:
        """This rank's float32 masters by name: whole parameters, or the flat pieces that ZeRO gave it."""
        if self._stage == 3:
            optimizer = self._engine.optimizer
            return {name: optimizer.get_local_fp32_param(p).detach() for name, p in self._trained.items()}
        if self._stage > 0:
            mappings = {name: p._hp_mapping for name, p in self._trained.items()}
            return {name: m.get_hp_fragment().detach() for name, m in mappings.items() if m is not None}
        if not self._low_precision():
            return {name: p.detach() for name, p in self._trained.items()}
        optimizer = self._engine.optimizer
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return {name: masters[id(p)].detach() for name, p in self._trained.items()}

    def weights(self) -> dict[str, Tensor]:
        if self._stage == 0:
            return {name: master.to("cpu", copy=True) for name, master in self._masters().items()}
        return {name: safe_get_full_fp32_param(p).to("cpu", copy=True) for name, p in self._trained.items()}

    def averaged_weights(self) -> dict[str, Tensor]:
        if self._ema is None:
            raise ValueError("averaged_weights without use_ema")
        # DeepSpeed knows how to gather masters, so the average takes their place for a moment.
        with self._ema.swapped_into(self._masters()):
            return self.weights()

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        if self._ema is not None:
            self._ema.save(folder / f"ema-{self._distributed.rank:05d}.safetensors")

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise MobiusError(f"{folder} holds no engine state of DeepSpeed")
        if self._ema is not None:
            self._ema.load(folder / f"ema-{self._distributed.rank:05d}.safetensors")

    def close(self) -> None:
        self._engine.destroy()


def _with_bucket_sizes(ds_config: dict[str, Any], trained: int) -> dict[str, Any]:
    """Buckets no larger than what is trained: DeepSpeed allocates them whole."""
    zero = dict(ds_config["zero_optimization"])
    names = ["reduce_bucket_size", "allgather_bucket_size"] if zero.get("stage", 0) in (1, 2) else []
    if zero.get("stage", 0) == 3:
        names = ["reduce_bucket_size", "stage3_prefetch_bucket_size"]
    for name in names:
        if zero.get(name, "auto") == "auto":
            zero[name] = min(LARGEST_BUCKET, max(trained, 1))
    return ds_config | {"zero_optimization": zero}


def _check_precision(mixed_precision: str, device: torch.device) -> None:
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise MobiusError(
            f"mixed_precision=bf16, but {torch.cuda.get_device_name(device)} has no bfloat16: use mixed_precision=fp16"
        )
