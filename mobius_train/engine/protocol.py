"""The interface between the training loop and an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mobius_train.engine.contents import Contents


class StepReport(NamedTuple):
    """The result of an optimizer step."""

    applied: bool
    """False after a non-finite loss or gradient; weights, optimizer state and average are then unchanged."""
    gradient_norm: float
    """L2 norm over all parameters of the gradient averaged over ranks, before clipping; inf or nan if not applied."""
    loss_scale: float | None
    """Loss scale of the next step under fp16, else None."""


class Piece(NamedTuple):
    """A rank's part of a tensor: a range of the flattened tensor."""

    shape: tuple[int, ...]
    """Shape of the full tensor."""
    start: int
    """First element of the piece in the flattened tensor."""
    data: Tensor
    """1-D, float32: a view of the live state, on any device."""


Scalars = dict[str, int | float]


class Engine(Protocol):
    """Runs, differentiates, shards, optimizes and saves the trained module of a task, and no other module.

    Attributes:
        device: the device that the module computes on.
        dtype: the dtype of the module's weights during computation.
    """

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass; all arguments are passed through unchanged."""

    def backward(self, loss: Tensor) -> None:
        """Differentiate the scalar mean loss of a micro-batch. The engine divides by the accumulation steps."""

    def step(self, learning_rate: float) -> StepReport | None:
        """Step the optimizer. Call it after every micro-batch; it returns None while gradients accumulate."""

    def weights(self) -> dict[str, Tensor]:
        """Return full float32 CPU copies of the trained weights by name, on every rank. All ranks call it."""

    def averaged_weights(self) -> dict[str, Tensor]:
        """As `weights`, for their exponential moving average. Requires use_ema."""

    def contents(self) -> Contents:
        """Return the description of the engine's state."""

    def pieces(self) -> dict[str, Piece]:
        """Return this rank's share of the state, by `<kind>/<parameter>`; each element belongs to one rank.

        The kinds are weights, exp_avg, exp_avg_sq (Adam's moments) and, with use_ema, average.
        """

    def scalars(self) -> Scalars:
        """Return the rest of the state, which is equal on all ranks."""

    def restore(self, fill: Callable[[str, Piece], None], scalars: Scalars) -> None:
        """Restore the state saved by any engine with the same trained parameters. All ranks call it.

        Args:
            fill: writes the saved state of a name into a piece, for any number of ranks and any sharding.
        """

    def close(self) -> None:
        """Release hooks, threads and memory. The engine cannot be used afterwards."""
