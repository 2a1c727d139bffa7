"""Several sets of clips as one: their clips, captions, turns and order."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from clip_files import animation, shard, video
from opened_data import configured, opened, opened_as

from mobius_train.assembly.open_data import order_identity, shares_of
from mobius_train.data import clips as clips_module
from mobius_train.data.buckets import Shape
from mobius_train.data.clips import find_clips, open_clips
from mobius_train.data.describe_sets import describe_sets
from mobius_train.data.order import repeated_clip_of
from mobius_train.data.sets import first_of_all, joined, subset_of, with_prefix
from mobius_train.errors import MobiusError


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the shards dogs.tar of two clips and cats.tar of three; both have a clip "a"."""
    shard(tmp_path / "dogs.tar", ["a", "b"])
    shard(tmp_path / "cats.tar", ["a", "c", "d"])
    return tmp_path


def sets(folder: Path, **of_dogs: Any) -> list[Any]:
    return [{"path": str(folder / "dogs.tar"), **of_dogs}, str(folder / "cats.tar")]


# Which clips, with which captions


def test_sets_follow_each_other_with_their_captions(two: Path) -> None:
    clips = opened(two, train=sets(two, caption_prefix="sks dog,"))
    assert clips.keys == ["0/a", "0/b", "1/a", "1/c", "1/d"]
    assert [clips.captions(index) for index in range(3)] == [["sks dog, the a"], ["sks dog, the b"], ["the a"]]
    assert clips[0].caption == "sks dog, the a"
    # The control: other captions are other data.
    assert clips.identity != opened(two, train=sets(two)).identity


def test_one_set_is_what_a_path_was(two: Path) -> None:
    plain = open_clips(str(two / "dogs.tar"), num_frames=4, resolution=16)
    for train in (str(two / "dogs.tar"), [str(two / "dogs.tar")], [{"path": str(two / "dogs.tar"), "repeats": 1}]):
        clips = opened(two, train=train)
        assert (clips.keys, clips.identity, clips.turns) == (plain.keys, plain.identity, None)
        assert set(order_identity(configured(two, train=train), clips)) == {
            *("clips and captions", "decoder", "num_frames", "resolution", "seed", "random_frame", "caption weights")
        }


def test_a_subset_is_of_its_set_and_named_by_captions_or_keys(two: Path) -> None:
    # As the files have them: a caption without the prefix.
    clips = opened(two, train=sets(two, subset=["the b"], caption_prefix="sks"))
    assert clips.keys == ["0/b", "1/a", "1/c", "1/d"]
    entries = find_clips(str(two / "cats.tar"), "en")
    # In the order of all clips.
    assert [entry.key for entry in subset_of(entries, ["the d", "a"], "data.subset")] == ["a", "d"]
    with pytest.raises(MobiusError, match=r"data\.subset.*'the dx'; did you mean the d\?"):
        subset_of(entries, ["a", "the dx"], "data.subset")
    with pytest.raises(MobiusError, match=r"data\.train\.0\.subset.*'cat'"):
        opened(two, train=sets(two, subset=["cat"]))


def test_held_out_clips_are_taken_of_every_set_in_turn(two: Path) -> None:
    entries = joined([find_clips(str(two / name), "en") for name in ("dogs.tar", "cats.tar")])
    assert [entry.key for entry in first_of_all(entries, 3)] == ["0/a", "1/a", "0/b"]
    assert [entry.key for entry in first_of_all(entries, 99)] == ["0/a", "1/a", "0/b", "1/c", "1/d"]
    alone = find_clips(str(two / "cats.tar"), "en")
    assert first_of_all(alone, 2) == alone[:2]
    assert with_prefix(alone, " ") == alone


@pytest.mark.parametrize("broken", ["empty folder", "empty shard", "no such file"])
def test_a_set_without_clips_is_named(two: Path, broken: str) -> None:
    other = two / "other"
    if broken == "empty folder":
        other.mkdir()
    elif broken == "empty shard":
        shard(other, [])
    with pytest.raises(MobiusError, match=f"{other}"):
        opened(two, train=[str(two / "dogs.tar"), str(other)])
    # A set that is left out is not opened.
    assert len(opened(two, train=[str(two / "dogs.tar"), {"path": str(other), "repeats": 0}])) == 2


# How often and in which order


def test_every_epoch_has_each_clip_as_often_as_it_is_repeated(two: Path) -> None:
    clips = opened(two, train=sets(two, repeats=3))
    assert clips.turns is not None
    assert clips.epoch == 9
    order = partial(repeated_clip_of, turns=clips.turns, seed=5)
    epochs = [[order(epoch * 9 + place) for place in range(9)] for epoch in range(3)]
    assert all(Counter(epoch) == {0: 3, 1: 3, 2: 1, 3: 1, 4: 1} for epoch in epochs)
    assert epochs[0] != epochs[1]
    # Without a history, as a resumed run asks.
    assert order(13) == epochs[1][4]


def test_repeats_are_part_of_the_stored_order(two: Path) -> None:
    def identity(repeats: int) -> dict[str, str]:
        config = configured(two, train=sets(two, repeats=repeats))
        return order_identity(config, opened_as(config))

    assert identity(2) == identity(2) != identity(3)
    assert set(identity(2)) - set(identity(1)) == {"turns of each clip"}


def test_buckets_count_the_turns(two: Path) -> None:
    shard(two / "long.tar", ["l"], frames=8)
    buckets = [{"num_frames": 8, "width": 16, "height": 16}, {"num_frames": 4, "width": 16, "height": 16}]
    config = configured(two, train=[{"path": str(two / "long.tar"), "repeats": 6}, *sets(two)[:1]], buckets=buckets)
    clips = opened_as(config)
    assert {shape: float(share) for shape, share in shares_of(clips, config.data).items()} == {
        Shape(8, 16, 16): 0.75,
        Shape(4, 16, 16): 0.25,
    }


def test_an_absurd_epoch_is_refused(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips_module, "MAX_TURNS", 8)
    assert opened(two, train=sets(two, repeats=2)).epoch == 7
    with pytest.raises(MobiusError, match=r"\b9\b.*\b8\b.*repeats"):
        _ = opened(two, train=sets(two, repeats=3)).turns


# What is said


def test_each_set_is_described_with_its_rate(two: Path) -> None:
    (two / "film").mkdir()
    (two / "film" / "a.mp4").write_bytes(video(8))  # of 10 fps
    (two / "film" / "a.txt").write_text("a film")
    train = [*sets(two, repeats=3), str(two / "film"), {"path": str(two / "cats.tar"), "repeats": 0}]
    described = describe_sets(opened(two, train=train))
    assert list(described) == ["set 0", "set 1", "set 2", "set 3"]
    # 4 frames of 4 in 40 ms each, and 4 of 8 in 0.8 s.
    assert described["set 0"].startswith(f"{two / 'dogs.tar'}: 2 clips x 3; 4 frames at 25 fps")
    assert described["set 2"].startswith(f"{two / 'film'}: 1 clips; 4 frames at 5 fps")
    assert described["set 3"].endswith("left out")
    (frames,) = describe_sets(opened(two, train=str(two / "film"), frame_rate=8, num_frames=2)).values()
    assert frames.startswith("2 frames at 8 fps")


def test_the_rate_of_a_set_is_a_range_if_its_clips_differ(tmp_path: Path) -> None:
    for frames in (4, 8):
        (tmp_path / f"{frames}.webp").write_bytes(animation(frames))
        (tmp_path / f"{frames}.txt").write_text("x")
    (described,) = describe_sets(opened(tmp_path, train=str(tmp_path))).values()
    assert described.startswith("4 frames at 12.5 to 25 fps")
