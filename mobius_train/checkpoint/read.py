"""Reading a checkpoint of any number of ranks and any ZeRO stage, a range at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from mobius_train.checkpoint.format import CONFIG, State, random_file, read_json
from mobius_train.checkpoint.verify import Range, index, problems
from mobius_train.engine.protocol import Piece
from mobius_train.errors import MobiusError


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint to convert or look into, after every file of it was hashed.

    Raises:
        MobiusError: it is damaged; the message names the files.
    """
    found = problems(folder)
    if found:
        raise MobiusError("the checkpoint is damaged:\n" + "\n".join(f"  - {problem}" for problem in found))
    return Checkpoint(folder)


class Checkpoint:
    """A verified checkpoint. Tensors are read when they are asked for, no more than one at a time.

    Attributes:
        state: where the run stood, and what its state belongs to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, State.read(folder)
        self._files: dict[Path, Any] = {}

    @property
    def config(self) -> dict[str, Any]:
        """The resolved recipe, as its YAML has it.

        Raises:
            MobiusError: it is no YAML mapping.
        """
        path = self.folder / CONFIG
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise MobiusError(f"{path}: not YAML ({error})") from error
        if not isinstance(values, dict):
            raise MobiusError(f"{path}: not a YAML mapping")
        return values

    def random_states(self, rank: int) -> dict[str, Any]:
        """The random states of one of the ranks that wrote it."""
        return read_json(self.folder / random_file(rank, self.state.world_size))

    @cached_property
    def index(self) -> dict[str, list[Range]]:
        """Where the ranges of every tensor are, by `<kind>/<parameter>`."""
        return index(self.folder, self.state.world_size)

    def weights(self, averaged: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(parameter, whole float32 tensor), one after the other: the weights, or their moving average.

        Raises:
            MobiusError: there is no average, as the run did not use_ema.
        """
        kind = "average" if averaged else "weights"
        if averaged and not self.state.contents.use_ema:
            raise MobiusError(f"{self.folder} has no averaged weights: it was written without use_ema")
        for name, shape in self.state.contents.trained.items():
            whole = torch.empty(shape)
            self.fill(f"{kind}/{name}", Piece(tuple(shape), 0, whole.view(-1)))
            yield name, whole

    def fill(self, name: str, piece: Piece) -> None:
        """Write what was saved of a tensor into a piece of it.

        Raises:
            MobiusError: there is no such tensor.
        """
        if name not in self.index:
            raise MobiusError(f"{self.folder} holds no {name}: resume from another checkpoint")
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
