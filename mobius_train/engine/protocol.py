"""What the training loop wants of an engine; nothing here knows which one it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class StepReport(NamedTuple):
    """What an optimizer step did."""

    applied: bool
    """False after a non-finite loss or gradient: weights, optimizer state and average are as before."""
    gradient_norm: float
    """L2 norm over all parameters of the mean gradient of all ranks, before clipping; inf or nan if not applied."""
    loss_scale: float | None
    """The next step's under fp16, else None."""


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

    def save(self, folder: Path) -> None:
        """Write this rank's share of weights, optimizer state and average. All ranks call it."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote on as many ranks, to continue exactly. All ranks call it.

        Raises:
            MobiusError: the folder does not hold this engine's kind of state, or that of another module.
        """

    def close(self) -> None:
        """Let go of hooks, threads and memory; the engine is of no use afterwards."""
