"""A rank's tensors as one safetensors file: ranges of flattened wholes, which its metadata says the places of.

Tensor `weights/<parameter>` of the file is the elements from `start` on of the flattened parameter of `shape`:
metadata["pieces"] is the JSON object {tensor: [start, shape]}.
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
    """A rank's pieces in one buffer of host memory, which the next copy uses again; pinned where there are GPUs."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._pieces: dict[str, Piece] = {}

    def take(self, pieces: dict[str, Piece]) -> None:
        """Copy the pieces; training may go on when this returns."""
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
        """Write the copy; the buffer is the data of a safetensors file, so nothing is copied again."""
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
    """What a rank's file holds, by tensor; no tensor is read.

    Raises:
        MobiusError: the file is missing, or no file of a rank's tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            where = json.loads((file.metadata() or {})["pieces"])
            found = {}
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_slice(name)
                (size,) = tensor.get_shape()
                start, shape = where.pop(name)
                found[name] = Range(path, tuple(shape), start, start + size)
                if tensor.get_dtype() != "F32" or not 0 <= start < start + size <= math.prod(shape):
                    raise ValueError(f"{name} is no range of its tensor")
        if where:
            raise ValueError(f"{next(iter(where))} is missing")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise MobiusError(f"{path}: not a rank's tensors ({error})") from error
    return found
