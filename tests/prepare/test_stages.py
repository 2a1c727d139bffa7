"""Each stage on clips made so that the answer is known."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import made
import numpy as np
import pytest
from PIL import Image

from mobius_train.data.decode import decode_clip
from mobius_train.data.timing import as_browsers, displayed_frames, frame_rate
from mobius_train.errors import MobiusError
from mobius_train.prepare.frame_store import pack, unpack
from mobius_train.prepare.stages.buckets import Buckets
from mobius_train.prepare.stages.choose_frames import ChooseFrames
from mobius_train.prepare.stages.deduplicate import Deduplicate
from mobius_train.prepare.stages.dynamics import Dynamics
from mobius_train.prepare.stages.label_frequency import LabelFrequency
from mobius_train.prepare.stages.shots import Shots
from mobius_train.prepare.stages.stage import Stage
from mobius_train.prepare.stages.static import Static
from mobius_train.prepare.stages.text import Text


def _one(stage: Stage, clip: made.Candidate) -> made.Candidate:
    [clip] = stage.apply([clip])
    return clip


def _why(stage: Stage, clip: made.Candidate) -> str:
    dropped = _one(stage, clip).dropped
    assert dropped is not None
    return dropped.reason


def _textured(frames: int, seed: int, shift: int = 0, size: int = 64) -> np.ndarray:
    """A smooth random picture that moves by `shift` pixels a frame, round and round."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.stack([np.roll(picture, number * shift, axis=1) for number in range(frames)])


def _written(words: str, frames: int = 4) -> np.ndarray:
    picture = np.full((128, 256, 3), 255, np.uint8)
    cv2.putText(picture, words, (10, 75), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (0, 0, 0), 3)
    return np.repeat(picture[None], frames, axis=0)


@pytest.mark.parametrize(
    ("durations", "fps", "frames"),
    [
        ([100, 100, 100], 10, [0, 1, 2]),
        ([100, 300, 100], 10, [0, 1, 1, 1, 2]),
        ([50, 50, 50, 50], 10, [1, 3]),
        ([20], 10, [0]),
    ],
)
def test_frames_are_on_display_as_long_as_they_ask(durations: list, fps: float, frames: list[int]) -> None:
    assert displayed_frames(durations, fps) == frames


def test_durations_are_taken_as_browsers_take_them() -> None:
    assert as_browsers([0, 10, 20, 100]) == [100, 100, 20, 100]
    assert frame_rate([40, 40, 2000]) == 25


def test_a_clip_whose_frames_mostly_stand_still_is_static() -> None:
    moving = _textured(11, 0, shift=2)
    assert _one(Static(name="static"), made.clip(moving)).dropped is None
    held = np.concatenate([moving[:6], np.repeat(moving[5:6], 5, axis=0)])  # 5 of 10 steps
    dropped = _one(Static(name="static"), made.clip(held)).dropped
    assert dropped is not None
    assert dropped.detail == "50% of its frames"
    assert _one(Static(name="static", max_share=0.5), made.clip(held)).dropped is None


def test_a_frame_is_static_below_a_grey_difference_of_nine_tenths() -> None:
    changes = {0.8: "static", 1.0: None}  # of 255, on average: so many of ten columns become one level brighter a frame
    for change, reason in changes.items():
        frames = np.zeros((6, 10, 10, 3), np.uint8)
        for number in range(6):
            frames[number, :, : round(10 * change)] = number
        dropped = _one(Static(name="static"), made.clip(frames)).dropped
        assert (dropped and dropped.reason) == reason


def test_the_dynamic_degree_is_the_speed_of_what_moves() -> None:
    clips = {shift: made.clip(_textured(6, 1, shift, size=128), fps=10) for shift in (0, 1, 3)}
    degrees = {n: _one(Dynamics(name="dynamics"), clip).scores["dynamics"]["degree"] for n, clip in clips.items()}
    assert degrees[0] < 1
    assert degrees[1] == pytest.approx(10, rel=0.3)
    assert degrees[3] == pytest.approx(30, rel=0.3)
    assert _why(Dynamics(name="dynamics", minimum=5), made.clip(_textured(6, 1))) == "too little motion"
    assert _why(Dynamics(name="dynamics", maximum=5), clips[3]) == "too much motion"


def test_shots_end_where_the_picture_changes() -> None:
    clip = made.clip(np.concatenate([_textured(20, seed, shift=1) for seed in (2, 3, 4)]), fps=10)
    shots = Shots(name="shots").apply([clip])
    assert [shot.key for shot in shots] == ["a--shot000", "a--shot001", "a--shot002"]
    assert [(shot.start, shot.end) for shot in shots] == [(0, 2), (2, 4), (4, 6)]
    assert [len(shot.pixels) for shot in shots] == [20, 20, 20]
    [whole] = Shots(name="shots").apply([made.clip(_textured(60, 2, shift=1))])
    assert whole.key == "a"


def test_text_counts_by_the_papers_rule() -> None:
    assert _why(Text(name="text"), made.clip(_written("HELLO WORLD"))) == "text"
    kept = {
        "no text": made.clip(_textured(4, 5, size=128)),
        "fewer letters than 4": made.clip(_written("Hi")),
        "in one frame": made.clip(np.concatenate([_written("HELLO WORLD", 1), _written("", 3)])),
    }
    assert {why: _one(Text(name="text"), clip).dropped for why, clip in kept.items()} == dict.fromkeys(kept)
    large = Text(name="text", area=0.5)
    assert _one(large, made.clip(_written("HELLO WORLD"))).dropped is None


def test_chinese_is_text_too() -> None:
    """No font of the tests has it: the alphabet of the reader is looked at."""
    from mobius_train.prepare.stages.text import _reader

    alphabet = _reader(320, 0.4).text_rec.session.get_character_list()
    assert {"中", "国", "A"} <= set("".join(alphabet))


def test_removed_text_is_not_found_again() -> None:
    clip = _one(Text(name="text", action="remove"), made.clip(_written("HELLO WORLD")))
    assert clip.dropped is None
    assert clip.notes == ["text removed"]
    assert clip.pixels.min() > 200  # the black letters are gone
    clip.scores.clear()
    assert _one(Text(name="text"), clip).dropped is None


@pytest.mark.parametrize(
    ("how", "chosen", "fps", "times"),
    [("even", [0, 2, 4, 6], 5, (0, 0.8)), ("head", [0, 1, 2, 3], 10, (0, 0.4))],
)
def test_frames_are_chosen(how: str, chosen: list[int], fps: float, times: tuple[float, float]) -> None:
    frames = np.arange(8, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    clip = _one(ChooseFrames(name="choose_frames", count=4, how=how), made.clip(frames))
    assert clip.pixels[:, 0, 0, 0].tolist() == chosen
    assert clip.fps == fps
    assert (clip.start, clip.end) == pytest.approx(times)


def test_a_random_window_is_a_row_that_seed_and_key_choose() -> None:
    frames = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(3, 3)

    def window(seed: int, key: str) -> list[int]:
        stage = ChooseFrames(name="choose_frames", count=4, how="random", seed=seed)
        return _one(stage, made.clip(frames, key=key)).pixels[:, 0, 0, 0].tolist()

    assert window(0, "a") == window(0, "a") == list(range(window(0, "a")[0], window(0, "a")[0] + 4))
    assert len({window(seed, key)[0] for seed in range(5) for key in "ab"}) > 5
    too_few = _one(ChooseFrames(name="choose_frames", count=101), made.clip(frames))
    assert too_few.dropped is not None
    assert too_few.dropped.reason == "too few frames"


def test_all_windows_become_clips() -> None:
    frames = np.arange(11, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    stage = ChooseFrames(name="choose_frames", count=2, how="all", stride=2)
    clips = stage.apply(
        [made.clip(frames, key="k"), made.clip(frames[:3], key="one"), made.clip(frames[:2], key="two")]
    )
    assert [clip.key for clip in clips] == ["k--window000", "k--window001", "k--window002", "one", "two"]
    assert [clip.pixels[:, 0, 0, 0].tolist() for clip in clips[:4]] == [[0, 2], [4, 6], [8, 10], [0, 2]]
    # Ten frames per second, of which every second is taken.
    assert [(clip.fps, clip.start, clip.end) for clip in clips[:2]] == [(5, 0, 0.3), (5, 0.4, 0.7)]
    assert clips[0].group == clips[1].group
    assert clips[4].dropped is not None
    most = ChooseFrames(name="choose_frames", count=2, how="all", max_windows=2)
    assert [clip.pixels[:, 0, 0, 0].tolist() for clip in most.apply([made.clip(frames)])] == [[0, 1], [9, 10]]


@pytest.mark.parametrize("options", [{"stride": 2}, {"how": "head", "max_windows": 2}])
def test_options_of_windows_without_effect_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(name for name in options if name != "how")):
        ChooseFrames(name="choose_frames", count=2, **options)


def test_the_bucket_of_the_nearest_aspect_is_taken() -> None:
    stage = Buckets(name="buckets", sizes=((64, 64), (96, 48), (32, 32)))
    sizes = {
        size: _one(stage, made.clip(made.moving(size=size))).pixels.shape[2:0:-1]
        for size in [(100, 100), (200, 100), (120, 90), (40, 50)]
    }
    assert sizes == {(100, 100): (64, 64), (200, 100): (96, 48), (120, 90): (64, 64), (40, 50): (32, 32)}
    assert _why(stage, made.clip(made.moving(size=(30, 30)))) == "too small"
    enlarging = stage.model_copy(update={"max_enlarging": 1.25})
    assert _one(enlarging, made.clip(made.moving(size=(30, 30)))).pixels.shape[2:0:-1] == (32, 32)
    assert _why(enlarging, made.clip(made.moving(size=(25, 25)))) == "too small"
    assert _why(stage, made.clip(made.moving(size=(400, 40)))) == "aspect"


def test_a_bucket_cuts_and_scales_as_training_does() -> None:
    frames = made.moving(2, (50, 34))
    buffer = io.BytesIO()
    Image.fromarray(frames[0]).save(buffer, "PNG")
    trained = decode_clip(buffer.getvalue(), ".png", "a", num_frames=1, resolution=(32, 16))
    prepared = _one(Buckets(name="buckets", sizes=((32, 16),)), made.clip(frames)).pixels
    assert (prepared[0] == trained[0].permute(1, 2, 0).numpy()).all()
    assert not (prepared[0] == cv2.resize(frames[0], (32, 16))).all()


def _rows(stage: Deduplicate | LabelFrequency, clips: list[made.Candidate]) -> dict[str, str]:
    rows = [_one(stage, clip).row() for clip in clips]
    return {key: drop.reason for key, drop in stage.decide(rows).items()}


def test_copies_and_look_alikes_are_dropped() -> None:
    first, other = _textured(6, 6, 2), _textured(6, 7, 2)
    noise = np.random.default_rng(0).integers(-2, 3, first.shape)
    alike = (first.astype(int) + noise).clip(0, 255).astype(np.uint8)
    tinted = first.copy()
    tinted[..., 2] = np.minimum(tinted[..., 2], 200) + 50
    clips = [
        made.clip(frames, key=key)
        for key, frames in {
            "first": first,
            "copy": first.copy(),
            "alike": alike,
            "other": other,
            "tinted": tinted,
        }.items()
    ]
    expected = {"copy": "duplicate", "alike": "looks the same"}
    assert _rows(Deduplicate(name="deduplicate"), clips) == expected
    assert _rows(Deduplicate(name="deduplicate", perceptual=False), clips) == {"copy": "duplicate"}
    # Only its colour tells the tinted one apart.
    assert _rows(Deduplicate(name="deduplicate", colour=255), clips) == expected | {"tinted": "looks the same"}


def test_look_alikes_are_found_as_by_comparing_all_pairs() -> None:
    """The table of bands against the plain reference, on hashes that differ in 0 to 6 bits."""
    draw = np.random.default_rng(1)
    base = [int(draw.integers(0, 2**63)) for _ in range(6)]
    rows: list[dict[str, Any]] = []
    for number in range(120):
        value = base[number % 6]
        for bit in draw.integers(0, 64, draw.integers(0, 4)):
            value ^= 1 << int(bit)
        score = {"pixels": str(number), "looks": [f"{value:016x}"], "colours": [[0.0, 0.0, 0.0]]}
        rows.append({"key": f"{number}", "scores": {"deduplicate": score}})
    kept: list[int] = []
    expected = set()
    for row in rows:
        value = int(row["scores"]["deduplicate"]["looks"][0], 16)
        if any((value ^ other).bit_count() <= 2 for other in kept):
            expected.add(row["key"])
        else:
            kept.append(value)
    assert 10 < len(expected) < 110
    assert set(Deduplicate(name="deduplicate", looks=1).decide(rows)) == expected


def test_rare_labels_go() -> None:
    labels = {"a": ["cat"], "b": ["cat"], "c": ["cat", "rare"], "d": ["rare"], "e": []}
    clips = [made.clip(made.moving(2), key=key, labels=own) for key, own in labels.items()]
    stage = LabelFrequency(name="label_frequency", more_than=2)
    assert _rows(stage, clips) == {"d": "rare label", "e": "no label"}


def test_frames_between_passes_are_lossless_and_the_same_bytes() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)
    assert (unpack(pack(frames)) == frames).all()
    assert pack(frames) == pack(frames)


@pytest.mark.parametrize(
    ("shown", "action", "read", "dropped"),
    [("0000", "drop", 3, False), ("1100", "drop", 2, True), ("1000", "drop", 4, False), ("0110", "score", 4, False)],
)
def test_frames_are_read_until_the_answer_is_certain(
    monkeypatch: pytest.MonkeyPatch, shown: str, action: str, read: int, dropped: bool
) -> None:
    seen: list[int] = []

    def mask(stage: Text, frame: np.ndarray) -> np.ndarray:
        seen.append(int(frame[0, 0, 0]))
        return np.full(frame.shape[:2], 255 * int(shown[seen[-1]]), np.uint8)

    monkeypatch.setattr(Text, "_mask", mask)
    frames = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1) * np.ones((1, 8, 8, 3), np.uint8)
    clip = _one(Text(name="text", action=action), made.clip(frames))
    assert seen == list(range(read))
    assert (clip.dropped is not None) == dropped


def test_a_bucket_is_what_autoencoders_take() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        Buckets(name="buckets", sizes=[[64, 60]])


def test_stages_that_look_at_frames_come_after_decode(tmp_path: Path) -> None:
    source = {"kind": "folder", "path": str(tmp_path)}
    for stages, problem in (
        ([{"name": "static"}, {"name": "decode"}], "static must come after decode"),
        ([{"name": "static"}], "one decode.* 0"),
        ([{"name": "decode"}, {"name": "static"}, {"name": "static"}], "static occurs twice"),
    ):
        with pytest.raises(ValueError, match=problem):
            made.recipe(tmp_path / "out", source, stages=stages)


def test_a_source_is_a_local_path(tmp_path: Path) -> None:
    from mobius_train.prepare.preparation import prepare_data

    for path in ("pipe:touch /tmp/x", "https://example.com/a.tar", str(tmp_path / "absent.tar")):
        with pytest.raises(MobiusError, match=r"not a local path|there is no file"):
            prepare_data(made.recipe(tmp_path / "out", {"kind": "webdataset", "path": path}))
