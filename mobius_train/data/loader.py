"""Loaders: training batches without end, and held-out batches once through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from mobius_train.data.order import GlobalBatches, clip_of, frame_of
from mobius_train.stop import leave_to_parent

Collate = Callable[[list[tuple[int, Any]]], Any]


class Samples(Protocol):
    """A map-style data set of clips or encoded clips."""

    keys: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class _InOrder(Dataset[tuple[int, Any]]):
    """(global sample index, the clip, or a frame of it, that the run's order puts there)."""

    def __init__(self, samples: Samples, seed: int, random_frame_of: int | None) -> None:
        self.samples, self.seed, self.random_frame_of = samples, seed, random_frame_of

    def __getitem__(self, sample_index: int) -> tuple[int, Any]:
        sample = self.samples[clip_of(sample_index, len(self.samples), self.seed)]
        if self.random_frame_of is not None:
            sample = sample.frame(frame_of(sample_index, self.random_frame_of, self.seed))
        return sample_index, sample


class _Heldout(Dataset[tuple[int, Any]]):
    def __init__(self, samples: Samples, first_frame: bool) -> None:
        self.samples, self.first_frame = samples, first_frame

    def __getitem__(self, index: int) -> tuple[int, Any]:
        sample = self.samples[index]
        return index, sample.frame(0) if self.first_frame else sample


def training_batches(
    samples: Samples,
    collate: Collate,
    *,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    samples_seen: int,
    num_workers: int,
    random_frame_of: int | None = None,
) -> Iterator[Any]:
    """This rank's micro-batches, for ever, continuing after `samples_seen` samples of all ranks.

    random_frame_of: when given, one frame drawn from so many stands for each clip.
    """
    return iter(
        DataLoader(
            _InOrder(samples, seed, random_frame_of),
            batch_sampler=GlobalBatches(batch_size, rank, world_size, samples_seen),
            collate_fn=collate,
            num_workers=num_workers,
            timeout=600 if num_workers else 0,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_to_parent,
        )
    )


def heldout_batches(
    samples: Samples,
    collate: Collate,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    max_clips: int,
    first_frame: bool = False,
    even: bool = False,
) -> Iterator[Any]:
    """The first `max_clips` clips once, this rank's share of them; the sample index is the clip's.

    even: every rank has as many; those that would have fewer end with the first clip, which counts on rank 0 only.
    """
    count = min(max_clips, len(samples))
    mine = list(range(count))[rank::world_size]
    if even:
        mine += [0] * (-(-count // world_size) - len(mine))
    chunks = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return iter(DataLoader(_Heldout(samples, first_frame), batch_sampler=chunks, collate_fn=collate))
