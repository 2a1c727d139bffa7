"""Optimizer steps on one batch, and which parameters they reach."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mobius_train.conditions import Conditions
from mobius_train.models import Denoiser


class Batch(Protocol):
    """Noisy clips for a model of any family."""

    def given(self) -> tuple[Tensor, Tensor, Conditions]:
        """As `Denoiser.predict` takes them."""


def loss(model: Denoiser, batch: Batch) -> Tensor:
    return model.predict(*batch.given()).square().mean()


def train(model: Denoiser, batch: Batch, steps: int) -> dict[str, Tensor | None]:
    """The gradients by name after so many optimizer steps."""
    parameters = [parameter for parameter in model.trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(steps):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss(model, batch).backward()
    return {name: p.grad for name, p in model.trained.named_parameters() if p.requires_grad}


def idle(gradients: dict[str, Tensor | None]) -> set[str]:
    """The parameters without a finite, non-zero gradient."""
    return {
        name
        for name, gradient in gradients.items()
        if gradient is None or not gradient.isfinite().all() or not gradient.any()
    }
