"""How the ranks of a sequence group share a batch: by frames in the frozen model, by positions in temporal layers.

A temporal layer computes each position over all frames, a spatial layer each frame over all positions. So a state moves
from one sharing to the other by an all-to-all: each rank has its frames of all positions, and gets its positions of all
frames. Shares may differ by one.

Legend: P ranks; N = B·F frames of all ranks, ordered clip by clip, N_r those of rank r; Q positions of a frame, Q_r
those of rank r; C channels, H, W latent size, H·W = Q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from mobius_train.sequence.group import SequenceGroup

Grid = tuple[int, int]


def shares(count: int, size: int) -> list[int]:
    """The share of each of `size` ranks, the larger ones first."""
    whole, left = divmod(count, size)
    return [whole + (rank < left) for rank in range(size)]


def bounds(count: int, size: int) -> list[int]:
    """Where each rank's share begins, and where the last one ends."""
    return [0, *accumulate(shares(count, size))]


def gathered(group: SequenceGroup, own: Tensor, counts: Sequence[int]) -> Tensor:
    """The parts of all ranks along the first axis, without a graph; rank r's part has `counts[r]` entries there."""
    entry = own.shape[1:].numel()
    received = group.exchange(own.flatten().repeat(group.size), [own.numel()] * group.size, [n * entry for n in counts])
    return received().view(-1, *own.shape[1:])


class Split:
    """The shares of one batch. Without a group, all methods return what they are given.

    Args:
        frames: N.
    """

    def __init__(self, group: SequenceGroup | None, frames: int) -> None:
        self.group, self._frames = group, frames

    @property
    def lookahead(self) -> int:
        """How many results of `positions_ahead` should be waiting while a layer computes."""
        return 0 if self.group is None else self.group.lookahead

    def own(self, of_frames: Tensor) -> Tensor:
        """This rank's frames: (N, …) → (N_r, …)."""
        if self.group is None:
            return of_frames
        return of_frames.split(shares(self._frames, self.group.size))[self.group.rank]

    def positions(self, hidden: Tensor) -> Tensor:
        """This rank's positions: (N_r, C, H, W) → (N, C, Q_r, 1). Differentiable."""
        if self.group is None:
            return hidden
        return cast(Tensor, _ToPositions.apply(hidden.flatten(2), self, 2)).unsqueeze(-1)

    def frames(self, state: Tensor, grid: Grid) -> Tensor:
        """The inverse of `positions`: (N, C, Q_r, 1) → (N_r, C, H, W), with `grid` (H, W)."""
        if self.group is None:
            return state
        return cast(Tensor, _ToFrames.apply(state.squeeze(-1), self, 2, grid[0] * grid[1])).unflatten(2, grid)

    def positions_ahead(self, hidden: Tensor) -> Callable[[], Tensor]:
        """Start `positions`, without gradients, beside later work; the result waits for it."""
        if self.group is None:
            return lambda: hidden
        finish = self.start_to_positions(hidden.flatten(2), 2, ahead=True)
        return lambda: finish().unsqueeze(-1)

    def token_positions(self, hidden: Tensor) -> Tensor:
        """As `positions`: (N_r, Q, C) → (N, Q_r, C)."""
        return hidden if self.group is None else cast(Tensor, _ToPositions.apply(hidden, self, 1))

    def token_frames(self, state: Tensor, count: int) -> Tensor:
        """As `frames`: (N, Q_r, C) → (N_r, Q, C), with `count` Q."""
        return state if self.group is None else cast(Tensor, _ToFrames.apply(state, self, 1, count))

    def token_positions_ahead(self, hidden: Tensor) -> Callable[[], Tensor]:
        """As `positions_ahead`: (N_r, Q, C) → (N, Q_r, C)."""
        return (lambda: hidden) if self.group is None else self.start_to_positions(hidden, 1, ahead=True)

    def whole(self, of_frames: Tensor) -> Tensor:
        """All frames of a result that all ranks then use in the same way: (N_r, …) → (N, …).

        Each rank computes the gradient of the whole result. Backward returns that of its frames times P, so that the
        mean over all ranks, which engines take, is the gradient of the batch.
        """
        return of_frames if self.group is None else cast(Tensor, _Whole.apply(of_frames, self))

    def first_frames(self, of_frames: Tensor, num_frames: int) -> Tensor:
        """Those of each clip's first frame, on every rank: (N_r, …) → (B, …), with `num_frames` F. Differentiable.

        A copy, so that those of the other frames are freed.
        """
        if self.group is None:
            return of_frames.unflatten(0, (-1, num_frames))[:, 0].clone()
        before = bounds(self._frames, self.group.size)[self.group.rank]
        first = -(-before // num_frames)
        mine = of_frames[first * num_frames - before :: num_frames]
        clips = self._frames // num_frames
        placed = torch.nn.functional.pad(mine, (0, 0) * (mine.ndim - 1) + (first, clips - first - len(mine)))
        return cast(Tensor, _Sum.apply(placed, self.group))

    def start_to_positions(self, hidden: Tensor, axis: int, ahead: bool = False) -> Callable[[], Tensor]:
        """Start the exchange of (N_r, …) for (N, …), where `axis` has Q positions before and Q_r after it."""
        group = cast(SequenceGroup, self.group)
        parts = hidden.split(shares(hidden.shape[axis], group.size), dim=axis)
        shape = list(parts[group.rank].shape)
        of_frame = shape[1] * shape[2]
        of = [frames * of_frame for frames in shares(self._frames, group.size)]
        sent = torch.cat([part.flatten() for part in parts])
        finish = group.exchange(sent, [part.numel() for part in parts], of, ahead)
        return lambda: finish().view(self._frames, *shape[1:])

    def start_to_frames(self, state: Tensor, axis: int, count: int) -> Callable[[], Tensor]:
        """Start the inverse exchange, with `count` Q."""
        group = cast(SequenceGroup, self.group)
        frames = shares(self._frames, group.size)
        of_frame = state.shape[1] * state.shape[2]
        shapes = []
        for positions in shares(count, group.size):
            shape = [frames[group.rank], *state.shape[1:]]
            shape[axis] = positions
            shapes.append(shape)
        of = [shape[0] * shape[1] * shape[2] for shape in shapes]
        finish = group.exchange(state.flatten(), [n * of_frame for n in frames], of)

        def joined() -> Tensor:
            parts = finish().split(of)
            return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim=axis)

        return joined


# The only rank of a batch has all of it.
WHOLE = Split(None, 0)


class _ToPositions(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, split: Split, axis: int) -> Tensor:
        context.split, context.axis, context.count = split, axis, hidden.shape[axis]
        return split.start_to_positions(hidden, axis)()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return context.split.start_to_frames(gradient, context.axis, context.count)(), None, None


class _ToFrames(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, state: Tensor, split: Split, axis: int, count: int) -> Tensor:
        context.split, context.axis = split, axis
        return split.start_to_frames(state, axis, count)()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return context.split.start_to_positions(gradient, context.axis)(), None, None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, of_frames: Tensor, split: Split) -> Tensor:
        context.split = split
        group = cast(SequenceGroup, split.group)
        return gathered(group, of_frames, shares(split._frames, group.size))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return context.split.own(gradient) * context.split.group.size, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, summand: Tensor, group: SequenceGroup) -> Tensor:
        context.group = group
        return group.reduce(summand)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return context.group.reduce(gradient), None
