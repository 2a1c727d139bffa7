"""One micro-batch of training: the same for a run, a dry run, the audit and the measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mobius_train.engine.protocol import Engine
from mobius_train.tasks.task import Task

Forward = Callable[[], Tensor]


def micro_batch(
    task: Task, engine: Engine, batch: Any, observe: Callable[[Forward], Tensor] = lambda forward: forward()
) -> Tensor:
    """Forward and backward pass of one micro-batch; the engine's step comes after it.

    Args:
        observe: runs the forward pass, and may look at it.

    Returns:
        The mean loss, a scalar without a graph, on the engine's device.
    """
    loss = observe(lambda: task.loss(engine, batch).mean())
    engine.backward(loss)
    return loss.detach()
