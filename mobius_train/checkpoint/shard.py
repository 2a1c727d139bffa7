"""A rank's safetensors file of pieces, each a range of a flattened tensor.

The file's tensor `weights/<parameter>` has the elements from `start` on of the flattened parameter of `shape`. The
metadata holds these values: metadata["pieces"] is the JSON object {tensor: [start, shape]}.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mobius_train.engine.protocol import Piece
from mobius_train.errors import MobiusError
from mobius_train.files import File, write_file
from mobius_train.safetensors_header import lay_out


class PinnedCopy:
    """A copy of a rank's pieces in a reused buffer of host memory, pinned if there are GPUs."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._pieces: dict[str, Piece] = {}

    def take(self, pieces: dict[str, Piece]) -> None:
        """Copy the pieces. Training can continue when this returns."""
        total = sum(len(piece.data) for piece in pieces.values())
        cuda = torch.cuda.is_available()
        if self._buffer.numel() != total:
            self._buffer = torch.empty(total, pin_memory=cuda)
        self._pieces, offset = {}, 0
        for name, piece in pieces.items():
            copy = self._buffer.narrow(0, offset, len(piece.data))
            copy.copy_(piece.data, non_blocking=True)
            self._pieces[name] = piece._replace(data=copy)
            offset += len(piece.data)
        if cuda:
            torch.cuda.synchronize()

    def write(self, path: Path) -> File:
        """Write the copy. The buffer already has the layout of a safetensors file, so no second copy is needed."""
        where = {name: [piece.start, list(piece.shape)] for name, piece in self._pieces.items()}
        tensors = {name: (torch.float32, [len(piece.data)]) for name, piece in self._pieces.items()}
        layout = lay_out(tensors, {"pieces": json.dumps(where)}, compact=False)
        return write_file(path, [layout.header, self._buffer.view(torch.uint8).numpy().data])


@dataclass(frozen=True)
class Range:
    """Elements start … end - 1 of a flattened tensor of `shape`, in a file."""

    path: Path
    shape: tuple[int, ...]
    start: int
    end: int


def ranges(path: Path) -> dict[str, Range]:
    """Return the ranges in a rank's file, by tensor, without reading tensors.

    Raises:
        MobiusError: the file is missing, or not a valid file of a rank's tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            where = json.loads((file.metadata() or {})["pieces"])
            found = {}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_slice(name)
                (size,) = tensor.get_shape()
                start, shape = where.pop(name)
                if not all(type(number) is int and number >= 0 for number in (start, *shape)):
                    raise ValueError(f"the range of {name} is not of numbers")
                found[name] = Range(path, tuple(shape), start, start + size)
                if tensor.get_dtype() != "F32" or not 0 <= start < start + size <= math.prod(shape):
                    raise ValueError(f"{name} is not a valid range of its tensor")
        if where:
            raise ValueError(f"{next(iter(where))} is missing")
    except (
        OSError,
        SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise MobiusError(f"{path}: not a rank's tensors ({str(error)[:500]})") from error
    return found
