"""What the training loop wants of an engine; nothing here knows which one it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mobius_train.engine.contents import Contents


class StepReport(NamedTuple):
    """What an optimizer step did."""

    applied: bool
    """False after a non-finite loss or gradient: weights, optimizer state and average are as before."""
    gradient_norm: float
    """L2 norm over all parameters of the mean gradient of all ranks, before clipping; inf or nan if not applied."""
    loss_scale: float | None
    """The next step's under fp16, else None."""


class Piece(NamedTuple):
    """What a rank holds of a tensor."""

    shape: tuple[int, ...]
    """The whole tensor's."""
    start: int
    """Where the piece starts in the whole, flattened."""
    data: Tensor
    """1-D, float32: a view of the live state, on any device."""


Scalars = dict[str, int | float]


class Engine(Protocol):
    """Runs, differentiates, shards, optimizes and saves the trained module of a task, and nothing else of it.

    Attributes:
        device: where the module computes.
        dtype: what the module's weights are in while it computes.
    """

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass; arguments of any kind go through as they are."""

    def backward(self, loss: Tensor) -> None:
        """Differentiate one micro-batch; `loss` is its mean, a scalar. The engine divides by the accumulation."""

    def step(self, learning_rate: float) -> StepReport | None:
        """Call it after every micro-batch; None while gradients accumulate, then the optimizer's step."""

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name: whole, float32, copies on the CPU, on every rank. All ranks call it."""

    def averaged_weights(self) -> dict[str, Tensor]:
        """As `weights`, of their exponential moving average; the settings must have use_ema."""

    def contents(self) -> Contents:
        """How its state is made."""

    def pieces(self) -> dict[str, Piece]:
        """This rank's share of the state, by `<kind>/<parameter>`: each element is one rank's.

        The kinds are weights, exp_avg, exp_avg_sq (Adam's moments) and, with use_ema, average.
        """

    def scalars(self) -> Scalars:
        """The rest of the state, the same on all ranks."""

    def restore(self, fill: Callable[[str, Piece], None], scalars: Scalars) -> None:
        """Take over the state of any engine of the same trained parameters. All ranks call it.

        Args:
            fill: writes the saved state of that name into the piece, on any number of ranks and however it was sharded.
        """

    def close(self) -> None:
        """Let go of hooks, threads and memory; the engine is of no use afterwards."""
