"""Loaders: infinite training batches, and one pass over the held-out clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mobius_train.data.order import GlobalBatches, caption_of, clip_of, frame_of, place_of
from mobius_train.job.stop import leave_to_parent

Collate = Callable[[list[tuple[int, Any]]], Any]


class Samples(Protocol):
    """A map-style data set of clips or encoded clips."""

    @property
    def keys(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any:
        """Return the clip with its first caption."""

    def read(self, index: int, caption: int, place: Fraction | None = None) -> Any:
        """Return the clip with caption number `caption`, and at the place of a random window if one is given."""


class _InOrder(Dataset[tuple[int, Any]]):
    """Pairs (global sample index, clip or frame at this index in the run's order)."""

    def __init__(
        self,
        samples: Samples,
        seed: int,
        order: Callable[[int], int],
        caption_weights: Mapping[int, Sequence[float]],
        random_frame_of: int | None,
        random_window: bool,
    ) -> None:
        self.samples, self.seed, self.order = samples, seed, order
        self.caption_weights, self.random_frame_of = caption_weights, random_frame_of
        self.random_window = random_window

    def __getitem__(self, sample_index: int) -> tuple[int, Any]:
        index = self.order(sample_index)
        weights = self.caption_weights.get(index)
        if weights is None and not self.random_window:
            sample = self.samples[index]
        else:
            caption = 0 if weights is None else caption_of(sample_index, weights, self.seed)
            place = place_of(sample_index, self.seed) if self.random_window else None
            sample = self.samples.read(index, caption, place)
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
    order: Callable[[int], int] | None = None,
    caption_weights: Mapping[int, Sequence[float]] | None = None,
    random_frame_of: int | None = None,
    random_window: bool = False,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """An infinite iterator over this rank's micro-batches, starting after `samples_seen` samples of all ranks.

    Args:
        order: maps a global sample index to a clip; None: `clip_of` over all clips.
        caption_weights: for each clip with several captions, their weights, by clip index.
        random_frame_of: if given, each sample is one frame, drawn from this many frames of its clip.
        random_window: draw the place of each sample's window.
        pin_memory: put the batches into pinned memory, from which a CUDA GPU copies while the host goes on. With
            workers this happens beside the training.
    """
    if order is None:
        order = partial(clip_of, count=len(samples), seed=seed)
    return iter(
        DataLoader(
            _InOrder(samples, seed, order, caption_weights or {}, random_frame_of, random_window),
            batch_sampler=GlobalBatches(batch_size, rank, world_size, samples_seen),
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_to_parent,
        )
    )


class HeldoutBatch(NamedTuple):
    """counts: (B,) bool, False for clips that only pad this rank to the same number of batches."""

    batch: Any
    counts: Tensor


def heldout_batches(
    samples: Samples,
    collate: Collate,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    shapes: Sequence[Any] | None = None,
    first_frame: bool = False,
    even: bool = False,
) -> Iterator[HeldoutBatch]:
    """One pass over this rank's share of the clips; sample indices are clip indices.

    Args:
        shapes: shapes of the clips if they differ; all clips of a batch have the same shape.
        even: give every rank the same number of batches, padded with clips that do not count.
    """
    alike: dict[Any, list[int]] = {}
    for index in range(len(samples)):
        alike.setdefault(None if shapes is None else shapes[index], []).append(index)
    chunks: list[list[int]] = []
    counts: list[Tensor] = []
    for indices in alike.values():
        share = indices[rank::world_size]
        padding = -(-len(indices) // world_size) - len(share) if even else 0
        counted = [True] * len(share) + [False] * padding
        share += indices[:1] * padding
        for start in range(0, len(share), batch_size):
            chunks.append(share[start : start + batch_size])
            counts.append(torch.tensor(counted[start : start + batch_size]))
    loader = DataLoader(_Heldout(samples, first_frame), batch_sampler=chunks, collate_fn=collate)
    return map(HeldoutBatch, loader, counts)
