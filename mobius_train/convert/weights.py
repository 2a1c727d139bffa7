"""Weights that are read one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """Named tensors, of which only one has to be in memory.

    Attributes:
        layout: shape and dtype of each tensor, known before any is read, as meta tensors.
        read: starts to read; yields every tensor of `layout` once, whole, in any order.
    """

    layout: dict[str, Tensor]
    read: Callable[[], Iterator[tuple[str, Tensor]]]

    @classmethod
    def of(cls, read: Callable[[], Iterator[tuple[str, Tensor]]]) -> Weights:
        """Weights whose layout is only known by reading them, which is done once for it."""
        return cls({name: tensor.to("meta") for name, tensor in read()}, read)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in `dtype`; indices and masks as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
