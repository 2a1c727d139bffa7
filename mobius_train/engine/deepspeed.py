"""DeepSpeed ZeRO as an engine."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from mobius_train.engine.distributed import Distributed
from mobius_train.engine.ds_config import with_bucket_sizes
from mobius_train.engine.ema import ExponentialMovingAverage
from mobius_train.engine.masters import masters_of
from mobius_train.engine.protocol import StepReport
from mobius_train.engine.settings import EngineSettings
from mobius_train.errors import MobiusError

# DeepSpeed tells every option at INFO when an engine starts.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TAG = "engine"
CONTENTS = "engine.json"


class DeepSpeedEngine:
    """ZeRO 0 to 3 over one module.

    Args:
        module: the trained module of a task; it is moved to the device and to the dtype of the settings. Those of its
            parameters that require a gradient are optimized, the others stay as they are.
        ds_config: what `ds_config.resolve` returned.

    Raises:
        MobiusError: nothing requires a gradient, or the GPU has no bfloat16.
    """

    def __init__(
        self, module: nn.Module, settings: EngineSettings, ds_config: dict[str, Any], distributed: Distributed
    ) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise MobiusError("nothing to train: no parameter of the trained module requires a gradient")
        _check_precision(settings.mixed_precision, distributed.device)
        self.device, self.dtype = distributed.device, DTYPES[settings.mixed_precision]
        self._settings, self._rank = settings, distributed.rank
        self._stage = int(ds_config["zero_optimization"]["stage"])
        self._trained = trained
        self._shapes = {name: list(p.shape) for name, p in trained.items()}
        # DeepSpeed takes the process group that is there.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self._engine, *_ = deepspeed.initialize(
            model=module.to(self.device),
            model_parameters=list(trained.values()),
            config=with_bucket_sizes(ds_config, sum(p.numel() for p in trained.values())),
            dist_init_required=False,
        )
        self._masters = masters_of(self._engine, trained, self._stage)
        self._ema = ExponentialMovingAverage(self._masters.pieces(), settings.ema_decay) if settings.use_ema else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        # A loss can be infinite and its gradient finite. NaN times a gradient is NaN, which reduction carries to every
        # rank, so that all of them skip the step; one times a loss is that loss, to the last bit.
        self._engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan))

    def step(self, learning_rate: float) -> StepReport | None:
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        report = self._step_float32() if self._unguarded() else self._step_guarded()
        if report.applied and self._ema is not None:
            self._ema.update(self._masters.pieces())
        return report

    def _unguarded(self) -> bool:
        """Stage 0 in float32 is torch's own optimizer: nothing measures the gradient or stops a bad one."""
        return self._stage == 0 and self.dtype == torch.float32

    def _step_float32(self) -> StepReport:
        # Reduced gradients are the same on all ranks, so all come to the same decision.
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        applied = math.isfinite(norm)
        if not applied:
            for parameter in self._trained.values():
                parameter.grad = None
        # Without gradients this only counts the micro-batch.
        self._engine.step()
        return StepReport(applied, norm, None)

    def _step_guarded(self) -> StepReport:
        scale = self._loss_scale()
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        norm = float(self._engine.get_global_grad_norm()) if applied else math.inf
        if self._stage == 0 and scale is not None:
            # Here DeepSpeed gives the norm of the scaled gradient.
            norm /= scale
        return StepReport(applied, norm, self._loss_scale())

    def _loss_scale(self) -> float | None:
        return float(self._engine.optimizer.loss_scale) if self.dtype == torch.float16 else None

    def weights(self) -> dict[str, Tensor]:
        return self._masters.gather(self._masters.pieces())

    def averaged_weights(self) -> dict[str, Tensor]:
        if self._ema is None:
            raise ValueError("there are no averaged weights without use_ema")
        return self._masters.gather(self._ema.pieces)

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        if self._ema is not None:
            self._ema.save(self._ema_path(folder))
        if self._rank == 0:
            (folder / CONTENTS).write_text(json.dumps(self._contents()), encoding="utf-8")

    def load(self, folder: Path) -> None:
        self._check_contents(folder)
        # Frozen parameters are not in the checkpoint, so it cannot be strict; _check_contents is.
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise MobiusError(f"{folder} holds no state of DeepSpeed")
        settings = self._settings
        for group in self._engine.optimizer.param_groups:
            # DeepSpeed restores these too, but the recipe decides.
            group["betas"] = (settings.adam_beta1, settings.adam_beta2)
            group["eps"], group["weight_decay"] = settings.adam_epsilon, settings.adam_weight_decay
        if self._ema is not None:
            self._ema.load(self._ema_path(folder))

    def _contents(self) -> dict[str, Any]:
        return {
            "engine": "deepspeed",
            "zero_stage": self._stage,
            "mixed_precision": self._settings.mixed_precision,
            "trained": self._shapes,
        }

    def _check_contents(self, folder: Path) -> None:
        try:
            saved = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MobiusError(f"cannot read {folder / CONTENTS}: {error}") from error
        mine = self._contents()
        for key in ("engine", "zero_stage", "mixed_precision"):
            if saved.get(key) != mine[key]:
                raise MobiusError(
                    f"{folder} was written with {key}={saved.get(key)!r}, and this run has {mine[key]!r}:"
                    " resume with the same, or start from the exported weights"
                )
        if saved.get("trained") != mine["trained"]:
            names = saved.get("trained", {}).keys() ^ mine["trained"].keys()
            raise MobiusError(
                f"{folder} holds other trained parameters than this run's, {len(names)} by name (for example"
                f" {min(names, default='none; shapes differ')}): resume with the same model and mode"
            )

    def _ema_path(self, folder: Path) -> Path:
        return folder / f"ema-{self._rank:05d}.safetensors"

    def close(self) -> None:
        self._engine.destroy()


def _check_precision(mixed_precision: str, device: torch.device) -> None:
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise MobiusError(
            f"mixed_precision=bf16, but {torch.cuda.get_device_name(device)} has no bfloat16: use mixed_precision=fp16"
        )
