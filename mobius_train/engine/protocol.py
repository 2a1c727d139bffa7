"""What the training loop wants of an engine: DeepSpeed today, FSDP2 beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class StepReport(NamedTuple):
    """What an optimizer step did."""

    applied: bool
    """False when the gradient was not finite: weights, optimizer state and average are as before."""
    gradient_norm: float
    """Of all ranks and parameters, before clipping."""
    loss_scale: float | None
    """The next step's, under fp16."""


class Engine(Protocol):
    """Wraps the trained module of a task, and nothing else of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass; arguments go through as they are."""

    def backward(self, loss: Tensor) -> None:
        """One micro-batch; `loss` is its mean. The engine divides by the accumulation."""

    def step(self, learning_rate: float) -> StepReport | None:
        """After every micro-batch; None while gradients accumulate."""

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name: whole, float32, on the CPU, on every rank. All ranks call it."""

    def averaged_weights(self) -> dict[str, Tensor]:
        """As `weights`, of their exponential moving average."""

    def save(self, folder: Path) -> None:
        """Write this rank's share of weights, optimizer state and average. All ranks call it."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote on the same number of ranks, to continue exactly. All ranks call it."""

    def close(self) -> None:
        """Let go of threads and memory; the engine is of no use afterwards."""
