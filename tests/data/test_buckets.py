"""Buckets: where a clip goes, and which bucket each batch is of."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clip_files import animation, video, write_tar

from mobius_train.data.bucket_turns import Schedule
from mobius_train.data.buckets import Shape, batch_shares, best_bucket, clips_by_bucket, describe_buckets, sort_into
from mobius_train.data.clips import ClipDataset, open_clips
from mobius_train.data.decode import shape_of
from mobius_train.data.loader import heldout_batches, training_batches
from mobius_train.data.order import BucketOrder, caption_of
from mobius_train.data.shards import MARK
from mobius_train.errors import MobiusError

LONG, WIDE, TALL, STILL = Shape(8, 32, 32), Shape(4, 64, 32), Shape(4, 32, 64), Shape(1, 64, 64)
ALL = (STILL, WIDE, LONG, TALL)


# Where a clip goes


@pytest.mark.parametrize(
    ("clip", "bucket"),
    [
        (Shape(9, 64, 64), LONG),
        (Shape(8, 640, 320), LONG),  # most frames go before the aspect ratio
        (Shape(7, 100, 60), WIDE),
        (Shape(4, 60, 100), TALL),
        (Shape(3, 64, 32), STILL),
        (Shape(1, 500, 100), STILL),
        (Shape(30, 26, 26), LONG),  # enlarged by 1.23
        (Shape(30, 8, 8), LONG),  # enlarged by 4, as little as there is
    ],
)
def test_a_clip_goes_to_the_bucket_that_fits_it_best(clip: Shape, bucket: Shape) -> None:
    assert best_bucket(clip, ALL) == bucket


def test_a_small_clip_is_not_enlarged_where_a_smaller_bucket_fits() -> None:
    large, small = Shape(8, 64, 64), Shape(8, 32, 32)
    assert best_bucket(Shape(8, 40, 40), (large, small)) == small
    assert best_bucket(Shape(8, 60, 60), (large, small)) == large
    # Nor where that one has fewer frames; the control: by frames alone it would be.
    assert best_bucket(Shape(8, 40, 40), (large, Shape(4, 32, 32))) == Shape(4, 32, 32)
    assert best_bucket(Shape(8, 40, 40), (large, Shape(9, 32, 32))) == large
    # Nor beyond another limit that is asked for.
    assert best_bucket(Shape(8, 60, 60), (large, small), enlarged=1.0) == small


def test_clips_that_fit_no_bucket_are_counted_and_the_first_is_named() -> None:
    clips = [Shape(9, 8, 8), Shape(3, 8, 8), Shape(2, 8, 8)]
    with pytest.raises(MobiusError, match=r"2 of 3 clips .*data.buckets.* 4.* b with 3.*num_frames=1"):
        sort_into([LONG, WIDE], clips, "abc".__getitem__)
    assert sort_into([*ALL], clips, "abc".__getitem__) == [LONG, STILL, STILL]


def test_what_is_enlarged_or_made_a_still_is_said() -> None:
    files = [Shape(8, 8, 8), Shape(3, 64, 64), Shape(1, 64, 64)]
    lines = describe_buckets(ALL, files, sort_into(ALL, files, str), {LONG: Fraction(1, 3), STILL: Fraction(2, 3)})
    assert lines[2] == "bucket 4x32x64: 0 clips"
    assert "bucket 8x32x32: 1 clips, 33.3% of the batches; 1 of them enlarged by more than 1.25" in lines
    assert lines[-1].startswith("bucket 1x64x64: 2 clips, 66.7% of the batches; 1 of them are videos")


@pytest.mark.parametrize(("suffix", "kind"), [(".webp", "WEBP"), (".gif", "GIF"), (".mp4", ""), (".webm", "")])
def test_a_clip_is_measured_by_its_headers(suffix: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = animation(5, kind, (48, 32)) if kind else video(5, suffix, (48, 32))
    monkeypatch.setattr("mobius_train.data.decode.video_frames", None)
    monkeypatch.setattr("mobius_train.data.decode.picture_frames", None)
    monkeypatch.setattr("PIL.Image.Image.load", None)
    assert shape_of(data, suffix, "clip") == (5, 48, 32)
    with pytest.raises(MobiusError, match="clip"):
        shape_of(data[: len(data) // 4] if kind else b"", suffix, "clip")


# Shares


def test_shares_that_are_not_given_are_by_number_of_clips() -> None:
    counts = {LONG: 30, WIDE: 10, STILL: 60}
    assert batch_shares(counts, {}) == {LONG: Fraction(3, 10), WIDE: Fraction(1, 10), STILL: Fraction(6, 10)}
    assert batch_shares(counts, {STILL: 0.2}) == {LONG: Fraction(6, 10), WIDE: Fraction(2, 10), STILL: Fraction(1, 5)}
    thirds = batch_shares({LONG: 1, STILL: 5}, {LONG: 0.3333, STILL: 0.6666})
    assert sum(thirds.values()) == 1
    for given, match in (
        ({TALL: 0.1}, "4x32x64 has share 0.1 .*data.buckets"),
        ({LONG: 0.5, WIDE: 0.5}, "leave nothing for 1x64x64"),
        ({LONG: 0.5, WIDE: 0.2, STILL: 0.2}, "data.buckets.* 0.9"),
    ):
        with pytest.raises(MobiusError, match=match):
            batch_shares(counts, given)


# The schedule


SHARES = [
    [Fraction(1)],
    [Fraction(1, 2), Fraction(1, 2)],
    [Fraction(1, 10), Fraction(6, 10), Fraction(3, 10)],
    [Fraction(1, 1000), Fraction(999, 1000)],
    [Fraction(n, 36) for n in (8, 7, 6, 5, 4, 3, 2, 1)],
]


@pytest.mark.parametrize("shares", SHARES)
def test_all_buckets_come_first_and_shares_are_kept_at_every_batch(shares: list[Fraction]) -> None:
    schedule, buckets = Schedule(shares), len(shares)
    seen: Counter[int] = Counter()
    for k in range(3000):
        turn = schedule.turn(k)
        assert turn.before == seen[turn.bucket]  # no history is needed to know it
        seen[turn.bucket] += 1
        if k < buckets:
            assert turn.bucket == k
        for bucket, share in enumerate(shares):
            assert -share * buckets <= seen[bucket] - share * (k + 1) < 1


def test_a_late_batch_is_known_at_once() -> None:
    schedule = Schedule(SHARES[-1])
    counts = [schedule.turn(10**12 + k) for k in range(36)]
    assert Counter(turn.bucket for turn in counts) == {bucket: 8 - bucket for bucket in range(8)}


# The order


def _order(batch_size: int = 6, seed: int = 0) -> BucketOrder:
    clips = clips_by_bucket([LONG] * 10 + [WIDE] * 7 + [STILL] * 40)
    return BucketOrder(clips, batch_shares({s: len(c) for s, c in clips.items()}, {}), batch_size, seed)


def _shape(clip: int) -> Shape:
    return LONG if clip < 10 else WIDE if clip < 17 else STILL


def test_a_global_batch_is_of_one_bucket_and_an_epoch_of_each_holds_each_clip_once() -> None:
    order = _order()
    streams: dict[Shape, list[int]] = {LONG: [], WIDE: [], STILL: []}
    batches = [[order(g) for g in range(k * 6, k * 6 + 6)] for k in range(300)]
    shapes = [{_shape(clip) for clip in batch} for batch in batches]
    assert all(len(shape) == 1 for shape in shapes)
    # The largest first.
    assert [min(shape) for shape in shapes[:3]] == [LONG, WIDE, STILL]
    for batch in batches:
        streams[_shape(batch[0])] += batch
    for shape, clips in clips_by_bucket([_shape(clip) for clip in range(57)]).items():
        stream, count = streams[shape], len(clips)
        epochs = [stream[i : i + count] for i in range(0, len(stream) - count, count)]
        assert len(epochs) > 5
        assert all(sorted(epoch) == clips.tolist() for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert [_order(seed=1)(g) for g in range(6)] != batches[0]


class _Clips(torch.utils.data.Dataset[int]):
    def __init__(self) -> None:
        self.keys = [str(number) for number in range(57)]

    def __len__(self) -> int:
        return 57

    def __getitem__(self, index: int) -> int:
        return index

    def read(self, index: int, caption: int, place: object = None) -> int:
        return index * 10 + caption


def _batches(ranks: int, batch_size: int, samples_seen: int, steps: int, workers: int = 0) -> list[list[int]]:
    """Global batches of 12: the clips of all ranks' micro-batches."""
    streams = [
        training_batches(
            _Clips(),
            lambda samples: [clip for _, clip in samples],
            batch_size=batch_size,
            seed=3,
            rank=rank,
            world_size=ranks,
            samples_seen=samples_seen,
            num_workers=workers,
            order=_order(12, 3),
        )
        for rank in range(ranks)
    ]
    accumulation = 12 // batch_size // ranks
    return [[clip for _ in range(accumulation) for stream in streams for clip in next(stream)] for _ in range(steps)]


@pytest.mark.distributed
def test_the_same_global_batch_on_any_ranks_and_workers_and_after_a_resume() -> None:
    whole = _batches(1, 12, 0, 9)
    for ranks, batch_size, workers in ((1, 3, 0), (2, 3, 0), (4, 3, 0), (2, 6, 1)):
        assert _batches(ranks, batch_size, 0, 9, workers) == whole, (ranks, batch_size)
        assert _batches(ranks, batch_size, 5 * 12, 4, workers) == whole[5:]


def test_held_out_clips_are_batched_by_bucket_each_once() -> None:
    shapes = [_shape(clip) for clip in range(57)]
    for ranks in (1, 2, 3):
        for even in (False, True):
            counted: list[int] = []
            numbers = []
            for rank in range(ranks):
                batches = list(
                    heldout_batches(
                        _Clips(),
                        list,
                        batch_size=4,
                        rank=rank,
                        world_size=ranks,
                        shapes=shapes,
                        even=even,
                    )
                )
                numbers.append(len(batches))
                for batch, counts in batches:
                    assert len(batch) == len(counts)
                    assert len({_shape(clip) for clip, _ in batch}) == 1
                    counted += [clip for (clip, _), counts_here in zip(batch, counts, strict=True) if counts_here]
            assert sorted(counted) == list(range(57))
            assert not even or len(set(numbers)) == 1


# Clips


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    for name, data in {
        "a.webp": animation(5, size=(64, 32)),
        "b.mp4": video(9, ".mp4", (32, 32)),
        "c.png": animation(1, "PNG", (100, 80)),
        "d.gif": animation(4, "GIF", (32, 64)),
    }.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    return tmp_path


def _sorted(folder: Path, buckets: tuple[Shape, ...]) -> ClipDataset:
    clips = open_clips(str(folder), num_frames=4, resolution=16)
    files = [clips.measure(share, 2) for share in range(2)]
    return clips.in_buckets(buckets, [files[index % 2][index // 2] for index in range(len(clips))])


def test_pictures_and_clips_of_all_sizes_are_decoded_to_their_buckets(mixed: Path) -> None:
    clips = _sorted(mixed, ALL)
    assert clips.shapes == [WIDE, LONG, STILL, TALL]
    for index, shape in enumerate(clips.shapes):
        assert clips[index].frames.shape == (shape.num_frames, 3, shape.height, shape.width)


def test_the_identity_follows_the_buckets_that_clips_are_in(mixed: Path) -> None:
    clips = _sorted(mixed, ALL)
    assert clips.identity == _sorted(mixed, (*ALL, Shape(100, 8, 8))).identity  # one that no clip is in
    assert clips.identity != _sorted(mixed, (*ALL[:3], Shape(4, 32, 48))).identity
    assert clips.identity != open_clips(str(mixed), num_frames=4, resolution=16).identity


def test_what_a_shard_says_of_its_clips_saves_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"caption": "dog", "num_frames": 5, "width": 64, "height": 32, **MARK}
    members = {"a.json": json.dumps(said).encode(), "a.webp": animation(5, size=(64, 32))}
    partly = {"caption": "dog", "num_frames": 5, "width": 64, "height": "32", **MARK}
    members |= {"b.json": json.dumps(partly).encode(), "b.webp": animation(4, size=(32, 32))}
    others = {"caption": "dog", "num_frames": 240, "width": 1920, "height": 1080}  # of the original video
    members |= {"c.json": json.dumps(others).encode(), "c.webp": animation(4, size=(32, 32))}
    clips = open_clips(str(write_tar(tmp_path / "a.tar", members)), num_frames=4, resolution=16)
    assert clips.measure(0, 1) == [Shape(5, 64, 32), Shape(4, 32, 32), Shape(4, 32, 32)]
    monkeypatch.setattr("mobius_train.data.clips.shape_of", None)
    assert clips.measure(0, 3) == [Shape(5, 64, 32)]
    with pytest.raises(TypeError):
        clips.measure(1, 2)


# Captions


def test_captions_are_drawn_by_weight() -> None:
    weights = (1.0, 3.0, 0.5)
    drawn = Counter(caption_of(g, weights, seed=0) for g in range(9000))
    assert [drawn[number] / 9000 for number in range(3)] == pytest.approx([1 / 4.5, 3 / 4.5, 0.5 / 4.5], abs=0.015)
    assert [caption_of(g, weights, 0) for g in range(50)] == [caption_of(g, weights, 0) for g in range(50)]
    assert [caption_of(g, weights, 0) for g in range(50)] != [caption_of(g, weights, 1) for g in range(50)]
