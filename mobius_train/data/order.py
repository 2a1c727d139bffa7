"""The order in which a run sees its clips: a function of the seed alone.

Every training sample has a global index g = 0, 1, 2, …; g // n is its epoch, and a permutation drawn from
(seed, epoch) says which of the n clips it is. A global batch is a run of consecutive indices, of which
each rank takes its part. So nothing is lost or repeated whatever the number of ranks and workers, the
same global batch holds the same clips on one rank or on four, and a run continues from a sample count.

With buckets each of them has such an order of its own clips, and a whole global batch is of one bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mobius_train.data.bucket_turns import Schedule
from mobius_train.data.buckets import Shape


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def clip_of(sample_index: int, count: int, seed: int) -> int:
    """Which of `count` clips the global sample is."""
    epoch, position = divmod(sample_index, count)
    return int(_permutation(count, seed, epoch)[position])


def frame_of(sample_index: int, num_frames: int, seed: int) -> int:
    """Which of a clip's frames stands for it where one is drawn at random."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample_index * 7919 + 1) % 2**63)
    return int(torch.randint(num_frames, (), generator=generator))


def caption_of(sample_index: int, weights: Sequence[float], seed: int) -> int:
    """Which of a clip's captions a sample takes, in proportion to their weights."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + sample_index * 7919 + 2) % 2**63)
    point = float(torch.rand((), dtype=torch.float64, generator=generator)) * sum(weights)
    for number, weight in enumerate(weights[:-1]):
        point -= weight
        if point < 0:
            return number
    return len(weights) - 1


class BucketOrder:
    """Called with a global sample index: which clip it is.

    Args:
        clips: the numbers of each bucket's clips, one or more, the largest bucket first.
        shares: which part of the batches each bucket gives.
        batch_size: samples of a global batch, over all ranks and micro-batches.
    """

    def __init__(
        self, clips: Mapping[Shape, Sequence[int]], shares: Mapping[Shape, Fraction], batch_size: int, seed: int
    ) -> None:
        self._schedule = Schedule([shares[shape] for shape in clips])
        self._streams = [_Stream(torch.tensor(numbers), _bucket_seed(seed, shape)) for shape, numbers in clips.items()]
        self._batch_size = batch_size

    def __call__(self, sample_index: int) -> int:
        batch, place = divmod(sample_index, self._batch_size)
        turn = self._schedule.turn(batch)
        return self._streams[turn.bucket].clip(turn.before * self._batch_size + place)


class _Stream:
    """A bucket's clips without end, each once in an epoch."""

    def __init__(self, clips: Tensor, seed: int) -> None:
        self._clips, self._seed = clips, seed
        self._epoch, self._order = -1, clips

    def clip(self, position: int) -> int:
        epoch, place = divmod(position, len(self._clips))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed + epoch) % 2**63)
            self._epoch, self._order = epoch, self._clips[torch.randperm(len(self._clips), generator=generator)]
        return int(self._order[place])


def _bucket_seed(seed: int, shape: Shape) -> int:
    """Of its shape, not of its place in the recipe."""
    return seed * 1_000_003 + int.from_bytes(hashlib.sha256(str(shape).encode()).digest()[:7], "little")


class GlobalBatches(Sampler[list[int]]):
    """Endless micro-batches of global sample indices for one rank, from `samples_seen` on."""

    def __init__(self, batch_size: int, rank: int, world_size: int, samples_seen: int = 0) -> None:
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.samples_seen = samples_seen

    def __iter__(self) -> Iterator[list[int]]:
        start = self.samples_seen + self.rank * self.batch_size
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.batch_size * self.world_size
