"""What the training loop needs to know of the thing that it trains, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
