"""Splitting ranges of flattened tensors over ranks, and joining them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mobius_train.devices import collective_device
from mobius_train.engine.protocol import Piece


def part(piece: Piece, number: int, parts: int) -> Piece:
    """Return part `number` (from 0) of `parts` nearly equal parts of a piece."""
    size = len(piece.data)
    first, last = size * number // parts, size * (number + 1) // parts
    return Piece(piece.shape, piece.start + first, piece.data[first:last])


def whole(
    shape: tuple[int, ...], piece: Piece | None, device: torch.device, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Gather a full float32 CPU tensor on every rank from the pieces on the ranks of `group`.

    Args:
        piece: this rank's piece, if it holds one.
        device: of the model.
    """
    flat = torch.zeros(math.prod(shape), dtype=torch.float32, device=collective_device(device))
    if piece is not None:
        flat[piece.start :][: len(piece.data)].copy_(piece.data)
    dist.all_reduce(flat, group=group)
    return flat.view(shape).to("cpu", copy=True)
