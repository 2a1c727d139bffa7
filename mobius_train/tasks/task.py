"""The interface between the training loop and a training stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Total:
    """A sum and its number of terms: this rank's share of a mean."""

    sum: float
    count: int


@dataclass(frozen=True)
class Shown:
    """Files written by a validation, and metrics of them."""

    paths: list[Path] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def count(module: nn.Module | None, trained: bool) -> str:
    """The trained or the frozen parameters of a module, in millions."""
    numbers = [] if module is None else [p.numel() for p in module.parameters() if p.requires_grad == trained]
    return f"{sum(numbers) / 1e6:.2f}M"


class Task(Protocol):
    """A training stage: its trained module, data, loss and samples."""

    @property
    def trained(self) -> nn.Module:
        """The module that the engine wraps."""

    @property
    def units(self) -> list[list[nn.Module]]:
        """The layers of `trained`. An engine that shards it gathers one unit at a time."""

    @property
    def frozen_hash(self) -> str:
        """Hash of the frozen weights that the trained weights depend on; checkpoints do not contain them."""

    @property
    def data_identity(self) -> dict[str, str]:
        """Everything that decides which training samples come in which order, by name."""

    @property
    def epoch(self) -> int:
        """The number of samples of an epoch: clips or pictures, each as often as its set is repeated."""

    @property
    def overview(self) -> dict[str, str]:
        """What is trained, on which data, for the first lines of a run; by name.

        Read it before an engine takes the parameters apart; later it is the same.
        """

    def prepare_data(self) -> None:
        """Slow preparation before training, such as filling the latent cache. Collective."""

    def training_batches(self, samples_seen: int) -> Iterator[Any]:
        """Yield this rank's micro-batches endlessly, after `samples_seen` samples of all ranks."""

    def ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same micro-batches for `loss`. With `frozen_ahead` each comes when the next one's frozen part has begun.

        Batches that do not come from here have no frozen part that has begun; `loss` takes them too.
        """

    def loss(self, engine: Callable[..., Any], batch: Any) -> Tensor:
        """The losses of a micro-batch, (B,) float32, with the engine called in place of `trained`."""

    def heldout_losses(self, weights: Weights) -> dict[str, Total]:
        """This rank's share of the held-out losses with the given weights, by metric name.

        `heldout_loss` is the first. Every rank has the same names. Without held-out data the result is empty.
        """

    def show(self, weights: Weights, folder: Path) -> Shown:
        """Write samples with the given weights on rank 0. Collective. Does not change the global random state."""

    def export(self, weights: Weights, folder: Path) -> None:
        """Write the finished model in diffusers' layout on rank 0. Collective."""
