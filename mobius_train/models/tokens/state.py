"""The states of a transformer over tokens, and their way back to latents.

Legend: N = B·F frames, ordered clip by clip; S image tokens of a frame, L text tokens, D width; h·w = S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """What a block of a transformer takes and gives: the feature of a layer, and its hidden state."""

    hidden: Tensor
    """x, the image tokens, (N, S, D)."""
    text: Tensor
    """c, the newest text state, (N, L, D)."""
    time: Tensor
    """The embedding of timestep and pooled conditions, (N, D)."""
    grid: tuple[int, int]
    """(h, w), the tokens of a frame row by row."""
    bias: Tensor | None = None
    """What attention to the text adds to its scores, (N, 1, L): a large negative number for padding, else 0."""
    of_blocks: Tensor | None = None
    """What the blocks take of the time, if it is not `time`."""

    def to(self, dtype: torch.dtype) -> Tokens:
        bias, of_blocks = (None if part is None else part.to(dtype) for part in (self.bias, self.of_blocks))
        hidden, text, time = (part.to(dtype) for part in (self.hidden, self.text, self.time))
        return Tokens(hidden, text, time, self.grid, bias, of_blocks)


class TokenShape(NamedTuple):
    """One block of a transformer."""

    channels: int
    """D"""
    heads: int
    """Attention heads of the image tokens."""


def unpatchify(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Patches of size·size latents, (N, h·w, size·size·C), channels last → latents (N, C, h·size, w·size)."""
    latents = torch.einsum("nhwpqc->nchpwq", patches.unflatten(-1, (size, size, -1)).unflatten(1, grid))
    return latents.flatten(4, 5).flatten(2, 3)
