"""Ranges of flattened tensors: cutting them for the ranks, and putting them together."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mobius_train.engine.protocol import Piece


def part(piece: Piece, number: int, parts: int) -> Piece:
    """One of `parts` about equal parts of a piece, counted from 0."""
    size = len(piece.data)
    first, last = size * number // parts, size * (number + 1) // parts
    return Piece(piece.shape, piece.start + first, piece.data[first:last])


def whole(
    shape: tuple[int, ...], mine: Piece | None, device: torch.device, group: dist.ProcessGroup | None = None
) -> Tensor:
    """A whole float32 tensor on the CPU, on every rank, of the pieces that the ranks of `group` hold of it.

    Args:
        mine: this rank's, if it holds any.
        device: where the ranks communicate.
    """
    flat = torch.zeros(math.prod(shape), dtype=torch.float32, device=device)
    if mine is not None:
        flat[mine.start :][: len(mine.data)].copy_(mine.data)
    dist.all_reduce(flat, group=group)
    return flat.view(shape).to("cpu", copy=True)
