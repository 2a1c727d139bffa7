"""Buckets: the shapes (frames, width, height) of training clips, and the assignment of clips to them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from mobius_train.data.packed import Coded
from mobius_train.errors import MobiusError

# Enlarging the sides by up to this factor does not count against a bucket.
ENLARGED = 1.25


class Shape(NamedTuple):
    """Frames and pixels of a clip, either in its file or in training."""

    num_frames: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.width}x{self.height}"

    @property
    def volume(self) -> int:
        """Number of pixels in all frames."""
        return self.num_frames * self.width * self.height


def largest_first(shapes: Sequence[Shape]) -> list[Shape]:
    return sorted(shapes, key=lambda shape: (shape.volume, shape), reverse=True)


def enlargement(clip: Shape, bucket: Shape) -> float:
    """The factor that scales the clip's sides to cover the bucket; above 1 the clip is enlarged."""
    return max(bucket.width / clip.width, bucket.height / clip.height)


def best_bucket(clip: Shape, buckets: Sequence[Shape], enlarged: float = ENLARGED) -> Shape | None:
    """The bucket that a clip is cropped and scaled to, or None if the clip has too few frames for every bucket.

    Criteria in this order: the smallest enlargement (factors up to `enlarged` are equal), the most frames, the nearest
    aspect ratio, the largest size.
    """

    def cost(bucket: Shape) -> tuple[float, int, float, int]:
        aspect = abs(math.log(bucket.width * clip.height / (bucket.height * clip.width)))
        # Rounding makes sizes of the same aspect ratio compare equal.
        return max(enlargement(clip, bucket), enlarged), -bucket.num_frames, round(aspect, 6), -bucket.volume

    return min((bucket for bucket in buckets if bucket.num_frames <= clip.num_frames), key=cost, default=None)


def sort_into(buckets: Sequence[Shape], clips: Sequence[Shape], name_of: Callable[[int], str]) -> Coded[Shape]:
    """The bucket of each clip.

    Args:
        clips: shapes of the clips in their files.
        name_of: maps a clip's index to its name in error messages.

    Raises:
        MobiusError: some clips have too few frames for every bucket.
    """
    clips = Coded.of(clips)
    best = [best_bucket(clip, buckets) for clip in clips.values]
    too_short = np.flatnonzero(np.isin(clips.codes, [code for code, bucket in enumerate(best) if bucket is None]))
    if len(too_short):
        fewest = min(bucket.num_frames for bucket in buckets)
        first = int(too_short[0])
        raise MobiusError(
            f"{len(too_short)} of {len(clips)} clips have fewer frames than the shortest bucket of data.buckets, which"
            f" has {fewest}. The first is {name_of(first)} with {clips[first].num_frames}. Remove these clips, or add a"
            " bucket with fewer frames; a bucket with num_frames=1 takes stills and the first frame of other clips"
        )
    return Coded(cast(Shape, best[code]) for code in clips.codes.tolist())


def clips_by_bucket(shapes: Sequence[Shape], turns: NDArray[np.int64] | None = None) -> dict[Shape, NDArray[np.int64]]:
    """The clip indices of each bucket, largest bucket first.

    Args:
        turns: the clips of an epoch, of which some are repeated; None: each once.
    """
    shapes = Coded.of(shapes)
    clips = np.arange(len(shapes)) if turns is None else turns
    codes = shapes.codes[clips]
    found = {shape: clips[codes == code] for code, shape in enumerate(shapes.values)}
    return {shape: found[shape] for shape in largest_first(shapes.values) if len(found[shape])}


def batch_shares(counts: Mapping[Shape, int], given: Mapping[Shape, float]) -> dict[Shape, Fraction]:
    """Each bucket's share of the batches; the shares sum to 1.

    Args:
        counts: number of clips in each bucket, greater than 0.
        given: shares set in the recipe. The other buckets divide the rest in proportion to their clips.

    Raises:
        MobiusError: a bucket has a share but no clip, or the given shares leave nothing for the other buckets, or do
            not sum to 1 where there are no others.
    """
    empty = [shape for shape in given if shape not in counts]
    if empty:
        raise MobiusError(
            f"the bucket {empty[0]} has share {given[empty[0]]} but no clips: remove it from data.buckets"
        )
    fixed = {shape: Fraction(share).limit_denominator(10**6) for shape, share in given.items()}
    rest = 1 - sum(fixed.values(), Fraction(0))
    free = {shape: count for shape, count in counts.items() if shape not in fixed}
    if free and rest <= 0:
        raise MobiusError(
            f"the shares in data.buckets leave nothing for {', '.join(map(str, free))}: their sum must be less than 1"
        )
    if not free and abs(rest) > Fraction(1, 1000):
        raise MobiusError(
            f"all buckets with clips have a share in data.buckets, and the shares sum to {float(1 - rest):g}: their sum"
            " must be 1"
        )
    if not free:
        return {shape: share / (1 - rest) for shape, share in fixed.items()}
    total = sum(free.values())
    return {shape: fixed.get(shape, rest * Fraction(count, total)) for shape, count in counts.items()}


def describe_buckets(
    buckets: Sequence[Shape], clips: Sequence[Shape], sorted_clips: Sequence[Shape], shares: Mapping[Shape, Fraction]
) -> list[str]:
    """One line for each bucket: its clips, its share, and assignments that may be unintended."""
    counts: Counter[Shape] = Counter()
    enlarged: Counter[Shape] = Counter()
    stilled: Counter[Shape] = Counter()
    for (clip, bucket), count in Counter(zip(clips, sorted_clips, strict=True)).items():
        counts[bucket] += count
        enlarged[bucket] += count * (enlargement(clip, bucket) > ENLARGED)
        stilled[bucket] += count * (bucket.num_frames == 1 < clip.num_frames)
    lines = []
    for bucket in largest_first(buckets):
        line = f"bucket {bucket}: {counts[bucket]} clips"
        if bucket in shares:
            line += f", {float(shares[bucket]):.1%} of the batches"
        if enlarged[bucket]:
            line += f"; {enlarged[bucket]} of them enlarged by more than {ENLARGED}"
        if stilled[bucket]:
            line += f"; {stilled[bucket]} of them are videos, too short or too small for the other buckets"
        lines.append(line)
    return lines
