"""What the training loop needs to know of the thing that it trains, and nothing more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Total:
    """A sum and how many were summed: this rank's share of a mean."""

    sum: float
    count: int


@dataclass(frozen=True)
class Shown:
    """What a validation has put on disk, and figures about it."""

    paths: list[Path] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


class Task(Protocol):
    """A stage of the method: its trained module, its data, its loss, its pictures."""

    @property
    def trained(self) -> nn.Module:
        """What the engine wraps."""

    @property
    def units(self) -> list[list[nn.Module]]:
        """Its layers: what an engine that shards it gathers at once."""

    @property
    def frozen_hash(self) -> str:
        """Identifies the weights that the trained ones belong to and that no checkpoint holds."""

    def prepare_data(self) -> None:
        """Slow preparation before training, such as the latent cache; every rank calls it."""

    def training_batches(self, samples_seen: int) -> Iterator[Any]:
        """This rank's micro-batches without end, after so many samples of all ranks."""

    def loss(self, engine: Callable[..., Any], batch: Any) -> Tensor:
        """(B,) float32 losses of a micro-batch; the engine is called in place of `trained`."""

    def heldout_loss(self, weights: Weights) -> Total | None:
        """This rank's share of the held-out loss under the given weights; none without held-out data."""

    def show(self, weights: Weights, folder: Path) -> Shown:
        """Make pictures under the given weights, on rank 0; all ranks call it. Leaves the global random state alone."""

    def export(self, weights: Weights, folder: Path) -> None:
        """Write the finished model, in the layout that diffusers reads, on rank 0; all ranks call it."""


class Inference:
    """Plain copies of a trained module with given weights, for evaluation beside the engine.

    An engine may have cut the live module into shards. The template holds the structure and no memory. Frozen weights
    are the live ones where an engine has left these whole.
    """

    def __init__(self, trained: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._live = {name: p for name, p in trained.named_parameters() if not p.requires_grad}
        # As they are before an engine takes them: in host memory.
        self._before = {name: parameter.detach() for name, parameter in self._live.items()}
        memo: dict[int, Any] = {
            id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=False) for tensor in trained.parameters()
        }
        self._template = copy.deepcopy(trained, memo)

    def model(self, weights: Weights) -> nn.Module:
        """The module with `weights` (trained parameters by name), in the inference dtype, in eval mode."""
        module = copy.deepcopy(self._template)
        state = {name: tensor.to(self.device, self.dtype) for name, tensor in weights.items()}
        frozen = {name: self._frozen(name) for name in self._live}
        module.load_state_dict({**frozen, **state}, assign=True, strict=True)
        return module.eval().requires_grad_(False)

    def _frozen(self, name: str) -> Tensor:
        live = self._live[name]
        # ZeRO-3 lets go of them between their uses; the small ones too, at times.
        if live.device == self.device and live.dtype == self.dtype and not hasattr(live, "ds_id"):
            self._before.pop(name, None)
            return live.detach()
        return self._before[name].to(self.device, self.dtype)
