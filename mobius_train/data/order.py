"""The order in which a run sees its clips: a function of the seed alone.

Every training sample has a global index g = 0, 1, 2, …; g // n is its epoch, and a permutation drawn from
(seed, epoch) says which of the n clips it is. A global batch is a run of consecutive indices, of which
each rank takes its part. So nothing is lost or repeated whatever the number of ranks and workers, the
same global batch holds the same clips on one rank or on four, and a run continues from a sample count.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler


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
