"""Reading of checkpoints from any number of ranks and any ZeRO stage, one range at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mobius_train.checkpoint.format import CONFIG, State, random_file, read_json
from mobius_train.checkpoint.verify import Range, index, problems
from mobius_train.engine.protocol import Piece
from mobius_train.errors import MobiusError
from mobius_train.files import read_small
from mobius_train.yaml_files import parse_yaml


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify the hashes of a checkpoint and open it for conversion or inspection.

    Raises:
        MobiusError: the checkpoint is damaged; the message names the files.
    """
    found = problems(folder)
    if found:
        raise MobiusError("the checkpoint is damaged:\n" + "\n".join(f"  - {problem}" for problem in found))
    return Checkpoint(folder)


class Checkpoint:
    """A verified checkpoint. Tensors are read on demand, one at a time.

    Attributes:
        state: the run's progress, and the settings that its state depends on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, State.read(folder)
        self._files: dict[Path, Any] = {}

    @property
    def config(self) -> dict[str, Any]:
        """The resolved recipe as YAML values, without validation.

        Raises:
            MobiusError: the file is not a YAML mapping.
        """
        path = self.folder / CONFIG
        try:
            values = parse_yaml(read_small(path).decode())
        except (OSError, ValueError) as error:
            raise MobiusError(f"{path}: not YAML ({str(error)[:500]})") from error
        if not isinstance(values, dict):
            raise MobiusError(f"{path}: not a YAML mapping")
        return values

    def random_states(self, rank: int) -> dict[str, Any]:
        """Return the random states of a rank of the run that wrote the checkpoint."""
        return read_json(self.folder / random_file(rank, self.state.world_size))

    @cached_property
    def index(self) -> dict[str, list[Range]]:
        """The ranges of every tensor, by `<kind>/<parameter>`."""
        return index(self.folder, self.state.world_size)

    def weights(self, averaged: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, full float32 tensor) for each weight, or for its moving average.

        Raises:
            MobiusError: the checkpoint has no average, because the run did not set use_ema.
        """
        kind = "average" if averaged else "weights"
        if averaged and not self.state.contents.use_ema:
            raise MobiusError(f"{self.folder} has no averaged weights: it was written without use_ema")
        for name, shape in self.state.contents.trained.items():
            whole = torch.empty(shape)
            self.fill(f"{kind}/{name}", Piece(tuple(shape), 0, whole.view(-1)))
            yield name, whole

    def fill(self, name: str, piece: Piece) -> None:
        """Copy the saved values of a tensor into a piece of it.

        Raises:
            MobiusError: the checkpoint does not contain the tensor.
        """
        if name not in self.index:
            raise MobiusError(f"{self.folder} does not contain {name}: resume from another checkpoint")
        first, last = piece.start, piece.start + len(piece.data)
        for part in self.index[name]:
            start, end = max(first, part.start), min(last, part.end)
            if start < end:
                saved = self._open(part.path).get_slice(name)[start - part.start : end - part.start]
                piece.data[start - first : end - first].copy_(saved)

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]
