"""Frames at a rate, with a stride, and in windows."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from clip_files import animation, numbers, video
from opened_data import opened

from mobius_train.data.decode import decode_clip, shape_of
from mobius_train.data.limits import Undecodable
from mobius_train.data.loader import training_batches
from mobius_train.data.order import place_of
from mobius_train.data.timing import MAX_TICKS, displayed_frames
from mobius_train.data.windows import FrameChoice, window_places, window_start
from mobius_train.errors import MobiusError

LAST = Fraction(1)


# The arithmetic


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize("most", [None, 1, 2, 3])
def test_windows_are_inside_and_do_not_overlap(count: int, stride: int, most: int | None) -> None:
    span = (count - 1) * stride + 1
    for ticks in range(span, 60):
        places = window_places(-(-ticks // stride), count, most)
        starts = [window_start(place, ticks, count, stride) for place in places]
        assert starts[0] == 0
        assert starts[-1] + span <= ticks
        # None shares a frame with the next, whatever the stride.
        assert all(after - before >= count * stride for before, after in pairwise(starts))
        # Not one more would fit.
        fit = (ticks - span) // (count * stride) + 1
        assert len(starts) == min(fit, most or fit)
        if len(starts) > 1:
            assert starts[-1] + span == ticks


def test_random_places_reach_every_start_evenly() -> None:
    starts = Counter(window_start(place_of(sample, 3), 10, 4) for sample in range(7000))
    assert sorted(starts) == list(range(7))
    assert min(starts.values()) > 880
    assert place_of(5, 3) == place_of(5, 3) != place_of(5, 4)


# Decoding. Frame i of a made clip shows i; an animation has 25 frames per second, a video 10.


@pytest.mark.parametrize(
    ("choice", "place", "expected"),
    [
        (FrameChoice(window="start"), 0, [0, 1, 2]),
        (FrameChoice(window="start", stride=3), 0, [0, 3, 6]),
        (FrameChoice(window="all", stride=3), LAST, [3, 6, 9]),
        (FrameChoice(window="random"), Fraction(1, 2), [4, 5, 6]),
        # The frames in the middle of each 0.2 s of frames of 0.1 s.
        (FrameChoice(window="start", rate=5), 0, [1, 3, 5]),
        (FrameChoice(window="all", rate=5), LAST, [5, 7, 9]),
        (FrameChoice(window="start", rate=5, stride=2), 0, [1, 5, 9]),
        (FrameChoice(window="start", rate=20), 0, [0, 0, 1]),
    ],
)
def test_frames_of_a_window(choice: FrameChoice, place: Any, expected: list[int]) -> None:
    frames = decode_clip(video(10), ".mp4", "clip", num_frames=3, resolution=16, choice=choice, place=Fraction(place))
    assert numbers(frames) == expected


def test_the_rate_is_that_of_time_not_of_the_file() -> None:
    """40 ms a frame: 25 frames per second."""
    data = animation(10)
    choice = FrameChoice(rate=12.5, window="start")
    assert shape_of(data, ".webp", "a", choice) == (5, 16, 16)
    assert numbers(decode_clip(data, ".webp", "a", num_frames=5, resolution=16, choice=choice)) == [1, 3, 5, 7, 9]
    # A still has one frame at every rate.
    assert shape_of(animation(1, "PNG"), ".png", "a", FrameChoice(rate=60, window="start")).num_frames == 1


def test_a_repeated_frame_is_told(caplog: pytest.LogCaptureFixture) -> None:
    choice = FrameChoice(rate=30, window="start")
    decode_clip(video(4), ".mp4", "slow.mp4", num_frames=6, resolution=16, choice=choice)
    assert "slow.mp4" in caplog.text
    assert "data.frame_rate=30" in caplog.text


def test_a_declared_length_is_bounded() -> None:
    with pytest.raises(Undecodable, match=f"too many frames.*{MAX_TICKS}"):
        displayed_frames([655_350.0] * 1000, 60)
    assert len(displayed_frames([1000.0] * 100, 60)) == 6000


# Data sets


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Films of 10 frames per second: a of 8 frames, b of 5."""
    for name, frames in (("a", 8), ("b", 5)):
        (tmp_path / f"{name}.mp4").write_bytes(video(frames))
        (tmp_path / f"{name}.txt").write_text(f"film {name}")
    return tmp_path


def test_all_windows_are_clips_of_their_own(films: Path) -> None:
    clips = opened(films, train=str(films), num_frames=2, frame_window="all")
    assert clips.keys == ["a#0", "a#1", "a#2", "a#3", "b#0", "b#1"]
    assert [numbers(clips[index].frames) for index in range(6)] == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1], [3, 4]]
    assert [clips[index].caption for index in (3, 4)] == ["film a", "film b"]
    assert clips[3].key == "a#3"
    two = opened(films, train=str(films), num_frames=2, frame_window="all", max_windows=2)
    assert [numbers(two[index].frames) for index in range(4)] == [[0, 1], [6, 7], [0, 1], [3, 4]]
    one = opened(films, train=str(films), num_frames=2, frame_window="start")
    assert one.keys == ["a", "b"]
    identities = [str(each.identity) for each in (clips, two, one, opened(films, train=str(films), num_frames=2))]
    assert len(set(identities)) == 4


def test_windows_are_repeated_with_their_set(films: Path) -> None:
    train = [{"path": str(films), "repeats": 2}]
    clips = opened(films, train=train, num_frames=4, frame_window="all")
    assert clips.keys == ["a#0", "a#1", "b"]
    assert clips.turns is not None
    assert clips.turns.tolist() == [0, 0, 1, 1, 2, 2]


def test_windows_have_the_frames_of_their_bucket(films: Path) -> None:
    buckets = [{"num_frames": 3, "width": 32, "height": 32}, {"num_frames": 2, "width": 32, "height": 32}]
    clips = opened(films, train=str(films), buckets=buckets, frame_stride=2, frame_window="all")
    # At stride 2 film a has 4 frames and film b 3.
    assert clips.keys == ["a", "b"]
    assert [numbers(clips[index].frames) for index in range(2)] == [[0, 2, 4], [0, 2, 4]]
    short = opened(films, train=str(films), buckets=buckets[1:], frame_stride=2, frame_window="all")
    assert short.keys == ["a#0", "a#1", "b"]
    assert [numbers(short[index].frames) for index in range(3)] == [[0, 2], [5, 7], [0, 2]]


@pytest.mark.parametrize(
    ("data", "frames"),
    [
        ({"num_frames": 6, "frame_window": "start"}, r"1 of 2 .*\b6\b.*b\.mp4 has 5\b"),
        ({"num_frames": 6, "frame_window": "all"}, r"1 of 2 .*b\.mp4 has 5\b"),
        ({"num_frames": 5, "frame_rate": 5}, r"2 of 2 .*5 fps.*a\.mp4 has 4\b"),
        ({"num_frames": 4, "frame_rate": 10, "frame_stride": 2}, r"1 of 2 .*stride 2.*b\.mp4 has 3\b"),
        ({"num_frames": 6, "frame_window": "random"}, r"1 of 2 .*b\.mp4 has 5\b"),
    ],
)
def test_a_window_longer_than_the_clip_is_refused_before_training(films: Path, data: Any, frames: str) -> None:
    with pytest.raises(MobiusError, match=rf"{frames}.*data\.num_frames"):
        opened(films, train=str(films), **data)


def test_random_windows_follow_from_the_sample_alone(films: Path) -> None:
    clips = opened(films, train=str(films), num_frames=2, frame_window="random")
    assert clips.keys == ["a", "b"]

    def stream(seen: int, seed: int = 1) -> list[list[int]]:
        batches = training_batches(
            clips,
            lambda samples: [numbers(clip.frames) for _, clip in samples],
            batch_size=1,
            seed=seed,
            rank=0,
            world_size=1,
            samples_seen=seen,
            num_workers=0,
            random_window=True,
        )
        return [frames for _ in range(20 - seen) for frames in next(batches)]

    whole = stream(0)
    assert stream(7) == whole[7:]
    assert all(after == before + 1 for before, after in whole)
    assert len({tuple(frames) for frames in whole}) > 4
    assert stream(0, seed=2) != whole
    # The held-out loss and the comparison take the first window.
    assert numbers(clips[0].frames) == [0, 1]
