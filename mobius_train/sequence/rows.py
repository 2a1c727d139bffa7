"""The rows around this rank's positions, for layers that mix neighbouring positions.

Legend: N frames of all ranks; Q = h·w positions of a frame, in rows of w; Q_r those of rank r, consecutive; C channels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mobius_train.sequence.group import SequenceGroup
from mobius_train.sequence.split import Grid, bounds


class _Range(NamedTuple):
    start: int
    stop: int

    def within(self, other: _Range) -> _Range:
        start = max(self.start, other.start)
        return _Range(start, max(start, min(self.stop, other.stop)))

    def of(self, state: Tensor, first: int) -> Tensor:
        """The part of (N, positions from `first` on, C)."""
        return state[:, self.start - first : self.stop - first]

    def __len__(self) -> int:
        return self.stop - self.start


def neighbour_rows(state: Tensor, grid: Grid, group: SequenceGroup | None) -> tuple[Tensor, slice]:
    """All rows of this rank's positions, with one row more on each side, up to the border of the frame.

    Args:
        state: (N, Q_r, C).
        grid: (h, w).

    Returns:
        (N, rows·w, C), and the place of this rank's positions in it.
    """
    if group is None:
        return state, slice(None)
    ranges = _Ranges(grid, group)
    place = ranges.own[group.rank].start - ranges.wanted[group.rank].start
    return cast(Tensor, _Rows.apply(state, ranges)), slice(place, place + state.shape[1])


class _Ranges:
    """The positions that each rank has, and those that it wants."""

    def __init__(self, grid: Grid, group: SequenceGroup) -> None:
        height, width = grid
        self.group = group
        self.own = [_Range(*pair) for pair in pairwise(bounds(height * width, group.size))]
        self.wanted = [
            _Range(max(0, own.start // width - 1) * width, min(height, (own.stop - 1) // width + 2) * width)
            for own in self.own
        ]
        mine = group.rank
        self.to = [wanted.within(self.own[mine]) for wanted in self.wanted]
        self.of = [self.wanted[mine].within(own) for own in self.own]

    def exchange(self, state: Tensor, first: int, to: list[_Range], of: list[_Range]) -> list[Tensor]:
        """Send parts of (N, positions from `first` on, C), and return the parts of the other ranks."""
        frames, _, channels = state.shape
        sent = torch.cat([part.of(state, first).flatten() for part in to])
        sizes = [len(part) * frames * channels for part in of]
        received = self.group.exchange(sent, [len(part) * frames * channels for part in to], sizes)()
        return [part.view(frames, -1, channels) for part in received.split(sizes) if part.numel()]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, state: Tensor, ranges: _Ranges) -> Tensor:
        context.ranges = ranges
        own = ranges.own[ranges.group.rank]
        return torch.cat(ranges.exchange(state, own.start, ranges.to, ranges.of), dim=1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        ranges: _Ranges = context.ranges
        rank = ranges.group.rank
        own = ranges.own[rank]
        parts = ranges.exchange(gradient, ranges.wanted[rank].start, ranges.of, ranges.to)
        total = gradient.new_zeros((len(gradient), len(own), gradient.shape[2]))
        for part, place in zip(parts, [place for place in ranges.to if len(place)], strict=True):
            place.of(total, own.start).add_(part)
        return total, None
