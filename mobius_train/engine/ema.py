"""The exponential moving average of trained weights, sharded as the engine shards them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mobius_train.errors import MobiusError

UPDATES = "number_of_updates"


class ExponentialMovingAverage:
    """a ← d · a + (1 - d) · w after every applied step, with d = min(decay, (1 + n) / (10 + n)) in update n.

    It holds what this rank holds of the float32 masters, by the parameter's name.
    """

    def __init__(self, masters: dict[str, Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._average = {name: master.clone() for name, master in masters.items()}

    @torch.no_grad()
    def update(self, masters: dict[str, Tensor]) -> None:
        """Take in the masters after a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self._average:
            names = list(self._average)
            torch._foreach_lerp_(
                [self._average[name] for name in names], [masters[name] for name in names], 1 - decay
            )

    @contextmanager
    def swapped_into(self, masters: dict[str, Tensor]) -> Iterator[None]:
        """The average stands in the masters' memory inside of the block, and the masters after it as before."""
        kept = {name: master.clone() for name, master in masters.items()}
        with torch.no_grad():
            for name, master in masters.items():
                master.copy_(self._average[name])
            try:
                yield
            finally:
                for name, master in masters.items():
                    master.copy_(kept[name])

    def save(self, path: Path) -> None:
        """Write this rank's part."""
        save_file({**self._average, UPDATES: torch.tensor(self.updates)}, path)

    def load(self, path: Path) -> None:
        """Read this rank's part back."""
        if not path.exists():
            raise MobiusError(f"{path} is missing: the checkpoint was written without use_ema; set use_ema=false")
        state = load_file(path)
        self.updates = int(state.pop(UPDATES))
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
