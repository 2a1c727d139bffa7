"""Buckets: the numbers of frames and sizes that clips are trained at, and which of them each clip goes to."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from mobius_train.errors import MobiusError

# Sides a clip may be enlarged by as long as another bucket, for which it need not be, has a place for it.
ENLARGED = 1.25


class Shape(NamedTuple):
    """Frames and pixels, of a clip as it lies in its file or as it is trained."""

    num_frames: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.width}x{self.height}"

    @property
    def volume(self) -> int:
        """Pixels of all frames."""
        return self.num_frames * self.width * self.height


def largest_first(shapes: Sequence[Shape]) -> list[Shape]:
    return sorted(shapes, key=lambda shape: (shape.volume, shape), reverse=True)


def enlarging(clip: Shape, bucket: Shape) -> float:
    """What the clip's sides are multiplied by to cover the bucket; above 1 it is enlarged."""
    return max(bucket.width / clip.width, bucket.height / clip.height)


def best_bucket(clip: Shape, buckets: Sequence[Shape], enlarged: float = ENLARGED) -> Shape | None:
    """The bucket that a clip is cropped and scaled to; None where it has too few frames for all.

    Of those that enlarge it least (up to `enlarged` all are alike), those of the most frames, of these the one of the
    nearest aspect ratio, and of its sizes the largest.
    """

    def cost(bucket: Shape) -> tuple[float, int, float, int]:
        aspect = abs(math.log(bucket.width * clip.height / (bucket.height * clip.width)))
        # Sizes of the same aspect ratio must be equal here, however they were rounded.
        return max(enlarging(clip, bucket), enlarged), -bucket.num_frames, round(aspect, 6), -bucket.volume

    return min((bucket for bucket in buckets if bucket.num_frames <= clip.num_frames), key=cost, default=None)


def sort_into(buckets: Sequence[Shape], clips: Sequence[Shape], name_of: Callable[[int], str]) -> list[Shape]:
    """Each clip's bucket.

    Args:
        clips: as they lie in their files.
        name_of: what a person knows clip i by.

    Raises:
        MobiusError: clips have too few frames for all buckets.
    """
    found: dict[Shape, Shape | None] = {clip: best_bucket(clip, buckets) for clip in set(clips)}
    sorted_clips: list[Shape] = []
    homeless: list[int] = []
    for index, clip in enumerate(clips):
        bucket = found[clip]
        if bucket is None:
            homeless.append(index)
        else:
            sorted_clips.append(bucket)
    if homeless:
        fewest = min(bucket.num_frames for bucket in buckets)
        first = homeless[0]
        raise MobiusError(
            f"{len(homeless)} of {len(clips)} clips have fewer frames than the {fewest} of the shortest of"
            f" data.buckets: the first is {name_of(first)} with {clips[first].num_frames}. Leave them out, or add a"
            " bucket of fewer frames; one of num_frames=1 takes stills, and of other clips the first frame"
        )
    return sorted_clips


def members(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """The numbers of the clips of each bucket, the largest bucket first."""
    clips: dict[Shape, list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        clips[shape].append(index)
    return {shape: clips[shape] for shape in largest_first(list(clips))}


def batch_shares(counts: Mapping[Shape, int], given: Mapping[Shape, float]) -> dict[Shape, Fraction]:
    """Which part of the batches each bucket gives; they add up to 1.

    Args:
        counts: clips of each bucket, more than 0.
        given: shares that the recipe fixes; the other buckets divide the rest by their numbers of clips.

    Raises:
        MobiusError: a bucket has a share and no clip, or the shares leave nothing, or too much.
    """
    empty = [shape for shape in given if shape not in counts]
    if empty:
        raise MobiusError(
            f"the bucket {empty[0]} has the share {given[empty[0]]} and not one clip: take it out of data.buckets"
        )
    fixed = {shape: Fraction(share).limit_denominator(10**6) for shape, share in given.items()}
    rest = 1 - sum(fixed.values(), Fraction(0))
    free = {shape: count for shape, count in counts.items() if shape not in fixed}
    if free and rest <= 0:
        raise MobiusError(
            f"the shares of data.buckets leave nothing for {', '.join(map(str, free))}: make them less than 1 together"
        )
    if not free and abs(rest) > Fraction(1, 1000):
        raise MobiusError(
            f"all buckets with clips have a share, and these make {float(1 - rest):g} together: make them 1"
        )
    if not free:
        return {shape: share / (1 - rest) for shape, share in fixed.items()}
    total = sum(free.values())
    return {shape: fixed.get(shape, rest * Fraction(count, total)) for shape, count in counts.items()}


def describe(
    buckets: Sequence[Shape], clips: Sequence[Shape], sorted_clips: Sequence[Shape], shares: Mapping[Shape, Fraction]
) -> list[str]:
    """Lines that say what each bucket has got, with what a person may not have meant."""
    counts = Counter(sorted_clips)
    enlarged: Counter[Shape] = Counter()
    stilled: Counter[Shape] = Counter()
    for clip, bucket in zip(clips, sorted_clips, strict=True):
        enlarged[bucket] += enlarging(clip, bucket) > ENLARGED
        stilled[bucket] += bucket.num_frames == 1 < clip.num_frames
    lines = []
    for bucket in largest_first(buckets):
        line = f"bucket {bucket}: {counts[bucket]} clips"
        if bucket in shares:
            line += f", {float(shares[bucket]):.1%} of the batches"
        if enlarged[bucket]:
            line += f"; {enlarged[bucket]} of them enlarged by more than {ENLARGED}"
        if stilled[bucket]:
            line += f"; {stilled[bucket]} of them no stills, but too short or too small for the others"
        lines.append(line)
    return lines
