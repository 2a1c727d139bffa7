"""Open a recipe's clips, sort them into buckets, and order them for training."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mobius_train.assembly.fetch import fetch_all, naming_set, remote_sources
from mobius_train.config import RunConfig
from mobius_train.config_sections import DataConfig
from mobius_train.data.buckets import Shape, batch_shares, clips_by_bucket, describe_buckets, largest_first
from mobius_train.data.clips import ClipDataset, find_clips, fingerprint
from mobius_train.data.entry_list import EntryList
from mobius_train.data.loader import Collate, Samples, training_batches
from mobius_train.data.order import BucketOrder, repeated_clip_of
from mobius_train.data.packed import Coded
from mobius_train.data.sets import NamedSet, first_of_all, joined, subset_of, with_prefix
from mobius_train.data.windows import WHOLE, FrameChoice
from mobius_train.errors import MobiusError, without_secrets
from mobius_train.files import json_pieces
from mobius_train.job.distributed import Distributed

logger = logging.getLogger(__name__)


def open_data(config: RunConfig, distributed: Distributed) -> tuple[ClipDataset, ClipDataset | None]:
    """Open the training clips and the held-out clips. Collective.

    Raises:
        MobiusError: clips are missing or damaged, or do not fit the recipe.
    """
    train = _open(config, "train", distributed)
    if train.shapes is not None:
        shares = shares_of(train, config.data)
        if config.stage == "text-to-video" and max(shape.num_frames for shape in shares) == 1:
            paths = ", ".join(one.name for one in train.sets)
            raise MobiusError(
                f"all clips of data.train={paths} are in buckets of one frame: text-to-video requires more frames"
            )
        only_a_ring = config.stage == "text-to-video" and config.mode == "parallel"
        if distributed.is_main and only_a_ring and any(shape.num_frames == 1 for shape in shares):
            logger.warning(
                "data.buckets has a bucket of one frame, but stage text-to-video with mode=parallel trains only the"
                " ring, which learns no motion from single frames: remove the bucket, or train images in a stage"
                " text-to-image, or with mode=full"
            )
        if distributed.is_main:
            wanted = [_shape(bucket) for bucket in config.data.buckets or ()]
            assert train.files is not None
            print(*describe_buckets(wanted, train.files, train.shapes, shares), sep="\n", flush=True)
    heldout = None if config.data.validation is None else _open(config, "validation", distributed)
    return train, heldout


def _open(config: RunConfig, name: Literal["train", "validation"], distributed: Distributed) -> ClipDataset:
    data = config.data
    sets = (data.train if name == "train" else data.validation) or ()
    choice = frame_choice(data)
    entries = joined([_of_set(data, name, number, distributed) for number in range(len(sets))])
    if name == "validation":
        entries = first_of_all(entries, config.validation.max_clips)
        # The same frames every time, and no more clips than were asked for.
        choice = choice._replace(window="start", most=None) if choice.window != "whole" else choice
    named = [NamedSet(without_secrets(one.path), one.repeats) for one in sets]
    # It reads every clip's file, so one rank does it.
    found = distributed.on_main(lambda: fingerprint(entries))
    clips = ClipDataset(
        entries, num_frames=data.num_frames, resolution=data.resolution, choice=choice, sets=named, found=found
    )
    if data.buckets is not None or choice.window != "whole":
        # This reads every clip, so each rank reads its share.
        parts = distributed.divide(clips.measure)
        files = Coded(parts[index % len(parts)][index // len(parts)] for index in range(len(clips)))
        if data.buckets is not None:
            clips = clips.in_buckets([_shape(bucket) for bucket in data.buckets], files)
        if choice.window != "whole":
            clips = clips.in_windows(files)
    # Reading one clip detects errors common to all clips, such as too few frames; counting, an absurd epoch.
    clips[0]
    _ = clips.epoch
    return clips


def _of_set(data: DataConfig, name: Literal["train", "validation"], number: int, distributed: Distributed) -> EntryList:
    """The clips of one set; none of a set that is left out."""
    sets = (data.train if name == "train" else data.validation) or ()
    one = sets[number]
    if not one.repeats:
        return EntryList()
    place: str | list[Path] = one.path
    remote = remote_sources(data, one.path)
    if remote:
        assert data.download_dir is not None
        place = fetch_all(remote, data.download_dir, name, distributed)
    with naming_set(data, name, number):
        entries = find_clips(place, data.caption_language, one.folder_captions, distributed)
    field, subset = f"data.{name}.{number}.subset", one.subset
    if name == "train" and data.subset is not None:
        field, subset = "data.subset", data.subset
    if subset is not None:
        entries = subset_of(entries, subset, field)
    return with_prefix(entries, one.caption_prefix)


def frame_choice(data: DataConfig) -> FrameChoice:
    """How the recipe takes the frames of training clips."""
    if data.frame_rate is None and data.frame_stride is None and data.frame_window is None:
        return WHOLE
    return FrameChoice(data.frame_rate, data.frame_stride or 1, data.frame_window or "start", data.max_windows)


def _shape(bucket: Any) -> Shape:
    return Shape(bucket.num_frames, bucket.width, bucket.height)


def largest_shape(data: DataConfig) -> Shape:
    """The clip shape of a recipe's largest batch, which is also its first."""
    if data.buckets is None:
        return Shape(data.num_frames, data.resolution, data.resolution)
    return largest_first([_shape(bucket) for bucket in data.buckets])[0]


def shares_of(clips: ClipDataset, data: DataConfig) -> dict[Shape, Fraction]:
    """The share of the batches that come from each bucket; the clips are in buckets.

    Raises:
        MobiusError: the recipe's shares are impossible.
    """
    counts = {shape: len(turns) for shape, turns in _turns_by_bucket(clips).items()}
    given = {_shape(bucket): bucket.share for bucket in data.buckets or () if bucket.share is not None}
    return batch_shares(counts, given)


def _turns_by_bucket(clips: ClipDataset) -> dict[Shape, NDArray[np.int64]]:
    assert clips.shapes is not None
    turns = clips.turns
    return clips_by_bucket(clips.shapes, None if turns is None else turns.numpy())


def order_identity(config: RunConfig, clips: ClipDataset) -> dict[str, str]:
    """Everything that decides which samples `recipe_batches` yields in which order, except the global batch size."""
    identity = clips.identity | {"seed": str(config.seed), "random_frame": str(config.data.random_frame)}
    weights = hashlib.sha256()
    for text in json_pieces(clips.caption_weights.items()):
        weights.update(text.encode())
    identity["caption weights"] = weights.hexdigest()
    turns = clips.turns
    if turns is not None:
        identity["turns of each clip"] = hashlib.sha256(turns.numpy().tobytes()).hexdigest()
    if clips.shapes is not None:
        shares = shares_of(clips, config.data)
        identity["share of each bucket"] = ", ".join(f"{shape}: {share}" for shape, share in shares.items())
    return identity


def recipe_batches(
    config: RunConfig, clips: ClipDataset, samples: Samples, collate: Collate, distributed: Distributed, seen: int
) -> Iterator[Any]:
    """Yield this rank's micro-batches endlessly.

    Args:
        samples: `clips`, or their cached encodings.
        seen: samples already trained on by all ranks.
    """
    order: Callable[[int], int] | None = None
    turns = clips.turns
    if clips.shapes is not None:
        size = config.samples_per_step(distributed.world_size)
        order = BucketOrder(_turns_by_bucket(clips), shares_of(clips, config.data), size, config.seed)
    elif turns is not None:
        order = partial(repeated_clip_of, turns=turns, seed=config.seed)
    return training_batches(
        samples,
        collate,
        batch_size=config.train_batch_size,
        seed=config.seed,
        rank=distributed.data_rank,
        world_size=distributed.data_size,
        samples_seen=seen,
        num_workers=config.data.dataloader_num_workers,
        order=order,
        caption_weights=clips.caption_weights,
        random_frame_of=config.data.num_frames if config.data.random_frame else None,
        random_window=clips.choice.window == "random",
        pin_memory=distributed.device.type == "cuda",
    )
