"""Which bucket each global batch is of: exact shares over time, spread evenly, known at any batch without a history.

Adams' method of apportionment: bucket b with share s has its batch number i (from 0) due at the time i / s, and
batches come in the order of these times. So all buckets come once at first, in their order, and among any first k
batches a bucket has less than one more than s·k, and at most s·n fewer, where n is the number of buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import NamedTuple


class Turn(NamedTuple):
    """The bucket of a batch, and how many batches of it came before."""

    bucket: int
    before: int


class Schedule:
    """
    Args:
        shares: of each bucket, more than 0, 1 together.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        # Whole numbers: the same on every machine, however large k.
        denominator = lcm(*(share.denominator for share in shares))
        self._weights = [int(share * denominator) for share in shares]
        common = lcm(*self._weights)
        self._periods = [common // weight for weight in self._weights]

    def turn(self, k: int) -> Turn:
        """Batch k, from 0."""
        buckets, total = len(self._weights), sum(self._weights)
        # All batches that are due before the time (k - n) / total: k or fewer.
        start = max(0, k - buckets)
        counts = [-(-start * weight // total) for weight in self._weights]
        for _ in range(k - sum(counts)):
            counts[self._next(counts)] += 1
        bucket = self._next(counts)
        return Turn(bucket, counts[bucket])

    def _next(self, counts: list[int]) -> int:
        """The bucket whose next batch is due first; of several the first."""
        due = [count * period for count, period in zip(counts, self._periods, strict=True)]
        return due.index(min(due))
