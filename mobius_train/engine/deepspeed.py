"""DeepSpeed ZeRO as an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mobius_train.devices import collective_device
from mobius_train.dtypes import DTYPES
from mobius_train.engine import deepspeed_setup, loss_scaler
from mobius_train.engine.adam_state import MOMENTS, AdamState
from mobius_train.engine.contents import Contents
from mobius_train.engine.ds_config import with_bucket_sizes
from mobius_train.engine.ema import ExponentialMovingAverage
from mobius_train.engine.masters import masters_of
from mobius_train.engine.optimizers import make_optimizer
from mobius_train.engine.precision import check_precision, guarded
from mobius_train.engine.protocol import Piece, Scalars, StepReport
from mobius_train.engine.settings import EngineSettings
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed


class DeepSpeedEngine:
    """ZeRO stages 0 to 3 for one module; the `Engine` protocol documents the methods.

    Args:
        module: the trained module of a task. It is moved to the device and cast to the dtype of the settings. Its
            parameters that require a gradient are optimized in float32.
        ds_config: the result of `ds_config.resolve`.

    Raises:
        MobiusError: no parameter requires a gradient, or the device does not support the dtype.
    """

    def __init__(
        self, module: nn.Module, settings: EngineSettings, ds_config: dict[str, Any], distributed: Distributed
    ) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise MobiusError("nothing to train: no parameter of the trained module requires a gradient")
        check_precision(settings.mixed_precision, distributed.device)
        self.device, self.dtype = distributed.device, DTYPES[settings.mixed_precision]
        self._settings, self._trained = settings, trained
        self._stage = int(ds_config["zero_optimization"]["stage"])
        self._contents = Contents(
            engine="deepspeed",
            zero_stage=self._stage,
            mixed_precision=settings.mixed_precision,
            use_ema=settings.use_ema,
            trained={name: list(p.shape) for name, p in trained.items()},
        )
        before_cast = {name: p.data for name, p in trained.items()} if self.dtype != torch.float32 else {}
        config = with_bucket_sizes(ds_config, sum(p.numel() for p in trained.values()))
        optimizer = make_optimizer(list(trained.values()), settings)
        self._engine = _initialize(module.to(self.device), optimizer, self._adapted(config))
        self._masters = masters_of(self._engine, trained, self._stage)
        self._start_from(before_cast)
        self._ema = None
        if settings.use_ema:
            self._ema = ExponentialMovingAverage(self._tensors(), settings.ema_decay)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss = guarded(loss)
        scale = self._loss_scale()
        if self._stage == 0 and scale is not None:
            # At stage 0 DeepSpeed divides gradients by the scale, but does not multiply the loss by it.
            loss = loss.float() * scale
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> StepReport | None:
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        report = self._step_plain() if self._plain() else self._step_guarded()
        if report.applied and self._ema is not None:
            self._ema.update(self._tensors())
        return report

    def weights(self) -> dict[str, Tensor]:
        return self._masters.gather(self._tensors())

    def averaged_weights(self) -> dict[str, Tensor]:
        if self._ema is None:
            raise ValueError("there are no averaged weights without use_ema")
        return self._masters.gather(self._ema.pieces)

    def contents(self) -> Contents:
        return self._contents

    def pieces(self) -> dict[str, Piece]:
        return {name: self._masters.share(piece) for name, piece in self._held(self._masters.adam()).items()}

    def scalars(self) -> Scalars:
        scalars: Scalars = {"adam_step": self._masters.adam_step}
        if self._ema is not None:
            scalars["ema_updates"] = self._ema.updates
        return scalars | loss_scaler.scalars_of(self._loss_scaler())

    def restore(self, fill: Callable[[str, Piece], None], scalars: Scalars) -> None:
        adam = self._masters.adam()
        for name, piece in self._held(adam).items():
            fill(name, piece)
        self._masters.refresh()
        self._masters.commit(adam, int(scalars["adam_step"]))
        if self._ema is not None:
            self._ema.updates = int(scalars["ema_updates"])
        loss_scaler.restore(self._loss_scaler(), scalars)

    def close(self) -> None:
        self._engine.destroy()

    def _tensors(self) -> dict[str, Tensor]:
        return {name: piece.data for name, piece in self._masters.pieces().items()}

    def _held(self, adam: AdamState) -> dict[str, Piece]:
        """Return all state that this rank holds, by `<kind>/<parameter>`."""
        weights = self._masters.pieces()
        held = {f"weights/{name}": piece for name, piece in weights.items()}
        for moment in MOMENTS:
            pieces = self._masters.pieces(partial(adam.moment, name=moment))
            held |= {f"{moment}/{name}": piece for name, piece in pieces.items()}
        if self._ema is not None:
            held |= {f"average/{name}": weights[name]._replace(data=data) for name, data in self._ema.pieces.items()}
        return held

    def _plain(self) -> bool:
        """True for stage 0 in float32, where DeepSpeed neither measures the gradient norm nor skips bad steps."""
        return self._stage == 0 and self.dtype == torch.float32

    def _adapted(self, config: dict[str, Any]) -> dict[str, Any]:
        # The optimizer is passed to DeepSpeed as an object.
        config = {key: value for key, value in config.items() if key != "optimizer"}
        # DeepSpeed's own measurement of samples per second waits for the device twice in every micro-batch.
        config["timers"] = {"throughput": {"enabled": False}}
        # The plain step measures the norm and clips by itself.
        return config | {"gradient_clipping": 0.0} if self._plain() else config

    def _start_from(self, weights: dict[str, Tensor]) -> None:
        """Restore the float32 weights, which DeepSpeed replaces by rounded ones under bf16 and fp16.

        It casts the module first, and then makes its float32 copies from the cast weights.
        """
        if self._stage == 0 and weights:
            # DeepSpeed has already stepped AdamW on zero gradients, which decays the weights and counts a step.
            self._engine.optimizer.optimizer.state.clear()
        pieces = self._masters.pieces()
        for name, weight in weights.items():
            # Random initial weights may differ between ranks; DeepSpeed broadcasts rank 0's.
            whole = weight.to(collective_device(self.device), torch.float32).contiguous()
            dist.broadcast(whole, src=0)
            if name in pieces:
                piece = pieces[name]
                piece.data.copy_(whole.flatten()[piece.start :][: len(piece.data)])

    def _step_plain(self) -> StepReport:
        # Reduced gradients are equal on all ranks, so all ranks make the same decision.
        parameters = [p for p in self._trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # The only wait for the device in a step.
        value = float(norm)
        applied = math.isfinite(value)
        if not applied:
            # AdamW skips parameters without a gradient: no decay, no moments, no step count.
            for parameter in parameters:
                parameter.grad = None
        elif self._settings.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._settings.max_grad_norm, norm)
        self._engine.step()
        return StepReport(applied, value, None)

    def _step_guarded(self) -> StepReport:
        scale = self._loss_scale()
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        norm = float(self._engine.get_global_grad_norm()) if applied else math.inf
        if self._stage == 0 and scale is not None:
            # At stage 0 DeepSpeed returns the norm of the scaled gradient.
            norm /= scale
        return StepReport(applied, norm, self._loss_scale())

    def _loss_scaler(self) -> Any:
        """Return the loss scaler under fp16, else None."""
        if self.dtype != torch.float16:
            return None
        optimizer = self._engine.optimizer
        return optimizer.loss_scale_config if self._stage == 0 else optimizer.loss_scaler

    def _loss_scale(self) -> float | None:
        return float(self._engine.optimizer.loss_scale) if self.dtype == torch.float16 else None


def _initialize(module: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> Any:
    deepspeed_setup.join()
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
