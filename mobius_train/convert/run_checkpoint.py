"""The weights of a run's checkpoints, sharded over any number of ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from mobius_train.checkpoint.folders import pointed
from mobius_train.checkpoint.format import EMA, MANIFEST, MODEL, NAME
from mobius_train.checkpoint.read import Checkpoint
from mobius_train.convert.lazy_weights import Weights
from mobius_train.errors import MobiusError


def find_run_checkpoint(source: Path, tag: str | None = None) -> Path | None:
    """`source` if it is a checkpoint, else the one in it named by `tag` or its file `latest`; None if there is none."""
    if (source / MANIFEST).is_file():
        return source
    name = tag or pointed(source) or ""
    return source / name if NAME.fullmatch(name) and (source / name / MANIFEST).is_file() else None


def weights_of(checkpoint: Checkpoint, entry: str) -> Weights:
    """The trained weights or their moving average, by their names in the module that the engine wrapped.

    Raises:
        MobiusError: there is no such entry.
    """
    entries = (MODEL, EMA) if checkpoint.state.contents.use_ema else (MODEL,)
    if entry not in entries:
        raise MobiusError(f"{checkpoint.folder} contains no weights {entry!r}; it contains {' and '.join(entries)}")
    layout = {name: torch.empty(shape, device="meta") for name, shape in checkpoint.state.contents.trained.items()}
    return Weights(layout, lambda: checkpoint.weights(averaged=entry == EMA))
