"""The exponential moving average of the trained weights, sharded as the engine shards the weights."""

from __future__ import annotations

import torch
from torch import Tensor


class ExponentialMovingAverage:
    """a ← d · a + (1 - d) · w after every applied step, with d = min(decay, (1 + n) / (10 + n)) in update n = 1, 2, …

    The warm-up of d makes the average forget the initial weights.

    Args:
        pieces: this rank's part of the float32 weights, by name. The average starts as a copy of them.
        decay: d after the warm-up.
    """

    def __init__(self, pieces: dict[str, Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.pieces = {name: piece.detach().clone() for name, piece in pieces.items()}

    @torch.no_grad()
    def update(self, pieces: dict[str, Tensor]) -> None:
        """Update the average with the weights after a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.pieces:
            new = [pieces[name] for name in self.pieces]
            torch._foreach_lerp_(list(self.pieces.values()), new, 1 - decay)
