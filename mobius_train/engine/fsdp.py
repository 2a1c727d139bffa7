"""FSDP2 (torch.distributed.fsdp.fully_shard) as an engine.

The optimizer, the average and the checkpoints do not use DTensors. They use plain tensors that share memory with this
rank's shards. A shard is a range of rows of a parameter, and so a range of the flattened parameter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mobius_train.config_sections import FsdpConfig
from mobius_train.dtypes import DTYPES
from mobius_train.engine import loss_scaler
from mobius_train.engine.adam_state import MOMENTS, AdamState
from mobius_train.engine.contents import Contents
from mobius_train.engine.ema import ExponentialMovingAverage
from mobius_train.engine.mesh import SHARD
from mobius_train.engine.optimizers import make_optimizer
from mobius_train.engine.pieces import part, whole
from mobius_train.engine.precision import check_precision, guarded
from mobius_train.engine.protocol import Piece, Scalars, StepReport
from mobius_train.engine.settings import EngineSettings
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed

# FSDP2 warns that no caller may change a returned view in place. No caller does.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")

Units = Sequence[Sequence[nn.Module]]


class FsdpEngine:
    """Parameters, gradients and optimizer states sharded over ranks; the `Engine` protocol documents the methods.

    Args:
        module: the trained module of a task. Its parameters that require a gradient are sharded and optimized in
            float32. The others are moved to the device and cast to the dtype of the settings.
        units: groups of submodules; the modules of a unit run one after the other. A unit's weights are gathered before
            it runs and freed after it. Weights in no unit stay gathered from the forward to the backward pass.
        mesh: the result of `mesh.make_mesh`.

    Raises:
        MobiusError: no parameter requires a gradient, or the device does not support the dtype.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Units,
        settings: EngineSettings,
        fsdp: FsdpConfig,
        mesh: DeviceMesh,
        distributed: Distributed,
    ) -> None:
        if not any(p.requires_grad for p in module.parameters()):
            raise MobiusError("nothing to train: no parameter of the trained module requires a gradient")
        check_precision(settings.mixed_precision, distributed.device)
        self.device, self.dtype = distributed.device, DTYPES[settings.mixed_precision]
        self._settings, self._mesh = settings, mesh
        # A mesh computes these anew at each call, which takes milliseconds.
        shard = mesh[SHARD]
        self._shards, self._shard_number, self._shard_group = shard.size(), shard.get_local_rank(), shard.get_group()
        self._replicas = mesh.size() // self._shards
        self._module = self._shard(module, units, fsdp)
        self._trained: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._masters = {name: nn.Parameter(p.to_local().detach()) for name, p in self._trained.items()}
        self._optimizer = make_optimizer(list(self._masters.values()), settings)
        self._contents = Contents(
            engine="fsdp",
            zero_stage=None,
            mixed_precision=settings.mixed_precision,
            use_ema=settings.use_ema,
            trained={name: list(p.shape) for name, p in self._trained.items()},
        )
        self._micro_batches, self._adam_step = 0, 0
        fp16 = self.dtype == torch.float16
        self._loss_scaler = loss_scaler.make_loss_scaler(fsdp.initial_scale_power) if fp16 else None
        self._ema = None
        if settings.use_ema:
            self._ema = ExponentialMovingAverage(self._tensors(), settings.ema_decay)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)  # type: ignore[operator]

    def backward(self, loss: Tensor) -> None:
        self._micro_batches += 1
        accumulation = self._settings.gradient_accumulation_steps
        self._module.set_requires_gradient_sync(self._micro_batches == accumulation)
        scale = self._loss_scale()
        loss = guarded(loss).float() / accumulation
        (loss if scale is None else loss * scale).backward()

    def step(self, learning_rate: float) -> StepReport | None:
        if self._micro_batches < self._settings.gradient_accumulation_steps:
            return None
        self._micro_batches = 0
        gradients = self._take_gradients()
        norm = self._norm(gradients) / (self._loss_scale() or 1.0)
        applied = math.isfinite(norm)
        if applied:
            self._apply(gradients, norm, learning_rate)
        for master in self._masters.values():
            master.grad = None
        if self._loss_scaler is not None:
            self._loss_scaler.update_scale(not applied)
        return StepReport(applied, norm, self._loss_scale())

    def weights(self) -> dict[str, Tensor]:
        return self._gather(self._tensors())

    def averaged_weights(self) -> dict[str, Tensor]:
        if self._ema is None:
            raise ValueError("there are no averaged weights without use_ema")
        return self._gather(self._ema.pieces)

    def contents(self) -> Contents:
        return self._contents

    def pieces(self) -> dict[str, Piece]:
        # Ranks with the same shard each save a part of it.
        replica, held = dist.get_rank() // self._shards, self._held(AdamState(self._optimizer))
        parts = {name: part(piece, replica, self._replicas) for name, piece in held.items()}
        return {name: piece for name, piece in parts.items() if len(piece.data)}

    def scalars(self) -> Scalars:
        scalars: Scalars = {"adam_step": self._adam_step}
        if self._ema is not None:
            scalars["ema_updates"] = self._ema.updates
        return scalars | loss_scaler.scalars_of(self._loss_scaler)

    def restore(self, fill: Callable[[str, Piece], None], scalars: Scalars) -> None:
        adam = AdamState(self._optimizer)
        for name, piece in self._held(adam).items():
            fill(name, piece)
        self._adam_step = int(scalars["adam_step"])
        for name in self._tensors():
            adam.commit(self._masters[name], self._adam_step)
        if self._ema is not None:
            self._ema.updates = int(scalars["ema_updates"])
        loss_scaler.restore(self._loss_scaler, scalars)

    def close(self) -> None:
        self._optimizer.state.clear()
        self._masters.clear()

    def _shard(self, module: nn.Module, units: Units, fsdp: FsdpConfig) -> FSDPModule:
        frozen = {p for p in module.parameters() if not p.requires_grad}
        for tensor in chain(frozen, module.buffers()):
            tensor.data = tensor.data.to(self.device, self.dtype if tensor.is_floating_point() else None)
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if fsdp.cpu_offload else OffloadPolicy()
        options: dict[str, Any] = {
            "mesh": self._mesh,
            # Gradients are reduced in float32.
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32),
            "offload_policy": offload,
            "ignored_params": frozen,
        }
        for unit in units:
            trained = [p for part in unit for p in part.parameters() if p.requires_grad]
            if trained:
                # Sharding unit by unit keeps at most one full unit on the device.
                self._broadcast(trained)
                fully_shard(list(unit), reshard_after_forward=fsdp.reshard_after_forward, **options)
        self._broadcast([p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)])
        return fully_shard(module, reshard_after_forward=False, **options)

    def _broadcast(self, parameters: list[nn.Parameter]) -> None:
        """Broadcast rank 0's weights; random initial weights may differ between ranks."""
        for parameter in parameters:
            parameter.data = parameter.data.to(self.device, torch.float32).contiguous()
            dist.broadcast(parameter.data, src=0)

    def _tensors(self) -> dict[str, Tensor]:
        """Return this rank's float32 weights by name. With more ranks than rows, some ranks hold none."""
        return {name: master.detach().view(-1) for name, master in self._masters.items() if master.numel()}

    def _held(self, adam: AdamState) -> dict[str, Piece]:
        """Return all state that this rank holds, by `<kind>/<parameter>`."""
        held = {f"weights/{name}": self._piece(name, tensor) for name, tensor in self._tensors().items()}
        for moment in MOMENTS:
            for name in self._tensors():
                held[f"{moment}/{name}"] = self._piece(name, adam.moment(self._masters[name], moment).view(-1))
        if self._ema is not None:
            held |= {f"average/{name}": self._piece(name, tensor) for name, tensor in self._ema.pieces.items()}
        return held

    def _piece(self, name: str, data: Tensor) -> Piece:
        """Locate this rank's shard in a parameter; fully_shard splits rows as torch.chunk does."""
        shape = tuple(self._trained[name].shape)
        rows = -(-shape[0] // self._shards)
        return Piece(shape, rows * self._shard_number * math.prod(shape[1:]), data)

    def _gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pieces = {name: self._piece(name, tensor) for name, tensor in tensors.items()}
        return {
            name: whole(tuple(p.shape), pieces.get(name), self.device, self._shard_group)
            for name, p in self._trained.items()
        }

    def _take_gradients(self) -> list[Tensor]:
        """Move the shards' gradients to the masters. The optimizer skips masters without a gradient."""
        gradients = []
        for name, parameter in self._trained.items():
            if parameter.grad is not None and self._masters[name].numel():
                gradient = parameter.grad.to_local()
                self._masters[name].grad = gradient
                gradients.append(gradient)
            parameter.grad = None
        return gradients

    def _norm(self, gradients: list[Tensor]) -> float:
        """Return the gradient norm over all ranks, equal on all ranks, so that all make the same decision."""
        square = torch.nn.utils.get_total_norm(gradients).to(self.device, torch.float64).square()
        dist.all_reduce(square)
        return math.sqrt(float(square) / self._replicas)

    def _apply(self, gradients: list[Tensor], norm: float, learning_rate: float) -> None:
        factor = 1 / (self._loss_scale() or 1.0)
        if self._settings.max_grad_norm > 0:
            factor *= min(1.0, self._settings.max_grad_norm / (norm + 1e-6))
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._adam_step += 1
        if self._ema is not None:
            self._ema.update(self._tensors())

    def _loss_scale(self) -> float | None:
        return None if self._loss_scaler is None else float(self._loss_scaler.loss_scale)
