"""How far the trained weights have moved since the start of training, by part of the model.

A run can end without an error and without an effect: with a learning rate near zero, with parameters outside of the
optimizer, or with gradients that vanish. The losses of a diffusion model are too noisy to show it; these figures do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# Elements of each tensor that are compared. They estimate the ratio of the norms, and need no second copy of the model.
SAMPLES = 2**14


class WeightChange:
    """The relative change ‖w - w₀‖ / ‖w₀‖ of each part, where w₀ are the weights at construction.

    It is estimated from at most `SAMPLES` evenly spaced elements of each tensor. A part is a module at the top of the
    trained model, or an entry of a list there: `conv_out`, `down_blocks.0`.

    Args:
        start: the trained parameters by name, whole, before any optimizer step.
    """

    def __init__(self, start: Iterable[tuple[str, Tensor]]) -> None:
        self._start = {name: _some(tensor) for name, tensor in start}

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the relative change by part, and of all weights as "all".

        A part that started at zero has the change 1 once it has moved, and 0 before.

        Args:
            weights: the same parameters now.
        """
        squares: dict[str, list[float]] = {}
        for name, before in self._start.items():
            now = _some(weights[name])
            scale = weights[name].numel() / max(1, before.numel())
            terms = [float(vector.square().sum()) * scale for vector in (now - before, before, now)]
            for part in (_part(name), "all"):
                squares[part] = [a + b for a, b in zip(squares.get(part, [0.0] * 3), terms, strict=True)]
        return {part: _ratio(*terms) for part, terms in squares.items()}


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    step = -(-flat.numel() // SAMPLES) or 1
    return flat[::step].to("cpu", torch.float32, copy=True)


def _part(name: str) -> str:
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if len(rest) > 1 and rest[0].isdigit() else first


def _ratio(change: float, before: float, now: float) -> float:
    scale = before or now
    return (change / scale) ** 0.5 if scale else 0.0
