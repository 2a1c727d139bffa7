"""Weights with lazy loading, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """Named tensors that are loaded one at a time.

    Attributes:
        layout: meta tensors with the shape and dtype of each tensor, available before reading.
        read: starts reading; yields every full tensor of `layout` once, in any order.
    """

    layout: dict[str, Tensor]
    read: Callable[[], Iterator[tuple[str, Tensor]]]

    @classmethod
    def of(cls, read: Callable[[], Iterator[tuple[str, Tensor]]]) -> Weights:
        """Create weights whose layout is unknown; this reads all tensors once."""
        return cls({name: tensor.to("meta") for name, tensor in read()}, read)


def cast_floating(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a floating-point tensor to `dtype`; other tensors are unchanged."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
