"""The order of a run's clips, a function of the seed only.

Every training sample has a global index g = 0, 1, 2, … Its epoch is g // n, and a permutation drawn from (seed, epoch)
maps it to one of the n clips. A global batch is a range of consecutive indices, divided among the ranks. No clip is
lost or repeated for any number of ranks and workers, a global batch contains the same clips on one rank or on four,
and a run resumes from its sample count. A clip that the recipe repeats k times counts as k clips.

With buckets, each bucket has such an order of its own clips, and all samples of a global batch come from one bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from mobius_train.data.bucket_turns import Schedule
from mobius_train.data.buckets import Shape


def permutation(count: int, seed: int) -> Tensor:
    """The numbers below `count`, (count,) int32, in an order that is drawn from the seed."""
    # The order is that of int64, in half of the memory.
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.int32)


# A process asks for one epoch after the other.
@lru_cache(maxsize=1)
def _epoch(count: int, seed: int, epoch: int) -> Tensor:
    return permutation(count, seed * 1_000_003 + epoch)


def clip_of(sample_index: int, count: int, seed: int) -> int:
    """The clip (of `count`) of a global sample."""
    epoch, position = divmod(sample_index, count)
    return int(_epoch(count, seed, epoch)[position])


def repeated_clip_of(sample_index: int, turns: Tensor, seed: int) -> int:
    """The clip of a global sample.

    Args:
        turns: the clips of an epoch, in any order; a clip occurs as often as it is repeated.
    """
    return int(turns[clip_of(sample_index, len(turns), seed)])


def place_of(sample_index: int, seed: int) -> Fraction:
    """The place of a global sample's random window, at least 0 and less than 1."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample_index * 7919 + 3) % 2**63)
    return Fraction(int(torch.randint(2**32, (), generator=generator)), 2**32)


def frame_of(sample_index: int, num_frames: int, seed: int) -> int:
    """The random frame (of `num_frames`) of a global sample."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample_index * 7919 + 1) % 2**63)
    return int(torch.randint(num_frames, (), generator=generator))


def caption_of(sample_index: int, weights: Sequence[float], seed: int) -> int:
    """The random caption of a global sample, drawn in proportion to the weights."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample_index * 7919 + 2) % 2**63)
    point = float(torch.rand((), dtype=torch.float64, generator=generator)) * sum(weights)
    for number, weight in enumerate(weights[:-1]):
        point -= weight
        if point < 0:
            return number
    return len(weights) - 1


class BucketOrder:
    """A callable that maps a global sample index to a clip.

    Args:
        clips: the clip indices of each bucket, at least one, largest bucket first; a clip occurs as often as it is
            repeated in an epoch.
        shares: each bucket's share of the batches.
        batch_size: samples in a global batch, over all ranks and micro-batches.
    """

    def __init__(
        self, clips: Mapping[Shape, NDArray[np.int64]], shares: Mapping[Shape, Fraction], batch_size: int, seed: int
    ) -> None:
        self._schedule = Schedule([shares[shape] for shape in clips])
        self._buckets = [
            _BucketClips(torch.tensor(numbers, dtype=torch.int32), _bucket_seed(seed, shape))
            for shape, numbers in clips.items()
        ]
        self._batch_size = batch_size

    def __call__(self, sample_index: int) -> int:
        batch, place = divmod(sample_index, self._batch_size)
        turn = self._schedule.turn(batch)
        return self._buckets[turn.bucket].clip(turn.before * self._batch_size + place)


class _BucketClips:
    """The infinite order of a bucket's clips; each occurs as often as given in an epoch."""

    def __init__(self, clips: Tensor, seed: int) -> None:
        self._clips, self._seed = clips, seed
        self._epoch, self._order = -1, clips

    def clip(self, position: int) -> int:
        epoch, place = divmod(position, len(self._clips))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._clips[permutation(len(self._clips), self._seed + epoch)]
        return int(self._order[place])


def _bucket_seed(seed: int, shape: Shape) -> int:
    """A seed that depends on the bucket's shape, not on its position in the recipe."""
    return seed * 1_000_003 + int.from_bytes(hashlib.sha256(str(shape).encode()).digest()[:7], "little")


class GlobalBatches(Sampler[list[int]]):
    """Infinite micro-batches of global sample indices for one rank, starting at `samples_seen`."""

    def __init__(self, batch_size: int, rank: int, world_size: int, samples_seen: int = 0) -> None:
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.samples_seen = samples_seen

    def __iter__(self) -> Iterator[list[int]]:
        start = self.samples_seen + self.rank * self.batch_size
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.batch_size * self.world_size
