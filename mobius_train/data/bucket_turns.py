"""The bucket of each global batch. Shares are exact over time, evenly spread, and computed without a history.

Adams' method of apportionment: batch i (from 0) of a bucket with share s is due at time i / s, and batches are ordered
by these times. Every bucket therefore comes once at the start, in the given order. Among the first k batches a bucket
has less than s·k + 1 batches and at least s·k - s·n, where n is the number of buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import NamedTuple


class Turn(NamedTuple):
    """The bucket of a batch, and the number of earlier batches of this bucket."""

    bucket: int
    before: int


class Schedule:
    """
    Args:
        shares: the share of each bucket, greater than 0; they sum to 1.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        # Integer arithmetic is exact on every machine and for every k.
        denominator = lcm(*(share.denominator for share in shares))
        self._weights = [int(share * denominator) for share in shares]
        common = lcm(*self._weights)
        self._periods = [common // weight for weight in self._weights]

    def turn(self, k: int) -> Turn:
        """The turn of batch k, counted from 0."""
        buckets, total = len(self._weights), sum(self._weights)
        # At most k batches are due before the time (k - n) / total.
        start = max(0, k - buckets)
        counts = [-(-start * weight // total) for weight in self._weights]
        for _ in range(k - sum(counts)):
            counts[self._next(counts)] += 1
        bucket = self._next(counts)
        return Turn(bucket, counts[bucket])

    def _next(self, counts: list[int]) -> int:
        """The bucket whose next batch is due first; ties go to the first bucket."""
        due = [count * period for count, period in zip(counts, self._periods, strict=True)]
        return due.index(min(due))
