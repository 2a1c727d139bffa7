"""Open a recipe's clips, sort them into buckets, and order them for training."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from mobius_train.assembly.fetch import fetch_all, remote_sources
from mobius_train.config import DataConfig, RunConfig
from mobius_train.data.buckets import Shape, batch_shares, clips_by_bucket, describe_buckets, largest_first
from mobius_train.data.clips import ClipDataset, open_clips
from mobius_train.data.loader import Collate, Samples, training_batches
from mobius_train.data.order import BucketOrder
from mobius_train.errors import MobiusError, without_secrets
from mobius_train.job.distributed import Distributed

logger = logging.getLogger(__name__)


def open_data(config: RunConfig, distributed: Distributed) -> tuple[ClipDataset, ClipDataset | None]:
    """Open the training clips and the held-out clips. Collective.

    Raises:
        MobiusError: clips are missing or damaged, or do not fit the recipe.
    """
    train = _open(config, "train", distributed)
    if train.shapes is not None:
        shares = shares_of(train.shapes, config.data)
        if config.stage == "text-to-video" and max(shape.num_frames for shape in shares) == 1:
            raise MobiusError(
                f"all clips of data.train={without_secrets(config.data.train)} are in buckets of one frame:"
                " text-to-video requires more frames"
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
    source = data.train if name == "train" else data.validation
    assert source is not None
    place: str | list[Path] = source
    remote = remote_sources(data, source)
    if remote:
        assert data.download_dir is not None
        place = fetch_all(remote, data.download_dir, name, distributed)
    clips = open_clips(
        place, num_frames=data.num_frames, resolution=data.resolution, caption_language=data.caption_language
    )
    if name == "validation":
        clips = clips.first(config.validation.max_clips)
    elif data.subset is not None:
        clips = clips.subset(data.subset)
    if data.buckets is not None:
        # This reads every clip, so each rank reads its share.
        mine = clips.measure(distributed.rank, distributed.world_size)
        parts = distributed.gather_objects(mine)
        files = [parts[index % len(parts)][index // len(parts)] for index in range(len(clips))]
        clips = clips.in_buckets([_shape(bucket) for bucket in data.buckets], files)
    # Reading one clip detects errors common to all clips, such as too few frames.
    clips[0]
    return clips


def _shape(bucket: Any) -> Shape:
    return Shape(bucket.num_frames, bucket.width, bucket.height)


def largest_shape(data: DataConfig) -> Shape:
    """The clip shape of a recipe's largest batch, which is also its first."""
    if data.buckets is None:
        return Shape(data.num_frames, data.resolution, data.resolution)
    return largest_first([_shape(bucket) for bucket in data.buckets])[0]


def shares_of(shapes: list[Shape], data: DataConfig) -> dict[Shape, Fraction]:
    """The share of the batches that come from each bucket.

    Raises:
        MobiusError: the recipe's shares are impossible.
    """
    counts = {shape: len(clips) for shape, clips in clips_by_bucket(shapes).items()}
    given = {_shape(bucket): bucket.share for bucket in data.buckets or () if bucket.share is not None}
    return batch_shares(counts, given)


def order_identity(config: RunConfig, clips: ClipDataset) -> dict[str, str]:
    """Everything that decides which samples `recipe_batches` yields in which order, except the global batch size."""
    identity = clips.identity | {"seed": str(config.seed), "random_frame": str(config.data.random_frame)}
    weights = json.dumps(sorted(clips.caption_weights.items()))
    identity["caption weights"] = hashlib.sha256(weights.encode()).hexdigest()
    if clips.shapes is not None:
        shares = shares_of(clips.shapes, config.data)
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
    order = None
    if clips.shapes is not None:
        size = config.samples_per_step(distributed.world_size)
        order = BucketOrder(clips_by_bucket(clips.shapes), shares_of(clips.shapes, config.data), size, config.seed)
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
    )
