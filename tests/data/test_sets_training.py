"""Whole runs on several sets, with windows of clips: the same from a cache, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipes import Run, losses
from tiny import save_clips

from mobius_train.errors import MobiusError

pytestmark = pytest.mark.slow
QUIET: dict[str, Any] = {"validation": {"prompts": [], "max_clips": 3}, "max_train_steps": 4}


@pytest.fixture
def two(tmp_path: Path) -> list[Any]:
    """Three clips of 9 frames, twice in an epoch, and five of 6."""
    long, short = save_clips(tmp_path / "long", 3, 9), save_clips(tmp_path / "short", 5, 6)
    return [{"path": str(long), "repeats": 2, "caption_prefix": "sks"}, str(short)]


def bits(output: Path) -> list[str]:
    return [loss.hex() for loss in losses(output)]


def test_windows_of_several_sets_train_the_same_from_a_cache(
    run: Run, two: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data: dict[str, Any] = {"train": two, "validation": two[1:], "frame_window": "all"}
    online = run("online", data=data, **QUIET)
    said = capsys.readouterr().out
    assert "3 clips x 2; 4 frames at 10 fps, 6 windows of 3 clips" in said
    # An epoch has 2 · 6 + 5 samples, a step 2.
    assert "4 of 2 samples: 0.471 epochs" in said
    cached = run("cached", data=data | {"cache_dir": str(tmp_path / "cache")}, **QUIET)
    assert bits(online) == bits(cached)
    (train,) = (tmp_path / "cache").glob("train-*")
    keys = json.loads((train / "keys.json").read_text())
    assert keys[:3] == ["0/clip00#0", "0/clip00#1", "0/clip01#0"]
    assert keys[6:] == [f"1/clip0{number}" for number in range(5)]
    # Another rate is another cache; the control of the equality above.
    other = run(
        "other", data=data | {"cache_dir": str(tmp_path / "cache"), "frame_rate": 10, "frame_stride": 1}, **QUIET
    )
    assert len(list((tmp_path / "cache").glob("train-*"))) == 2
    assert bits(other) == bits(online), "10 fps is the rate of the files"
    assert bits(run("slow", data=data | {"frame_rate": 5, "num_frames": 3}, **QUIET)) != bits(online)


def test_a_resumed_run_takes_the_same_random_windows(run: Run, two: list[Any]) -> None:
    options = QUIET | {"data": {"train": two, "validation": None, "frame_window": "random"}, "checkpointing_steps": 2}
    whole = run("whole", **options)
    run("part", **options | {"max_train_steps": 2})
    resumed = run("part", **options, resume_from_checkpoint="latest")
    assert bits(resumed) == bits(whole)
    assert bits(run("first", **options | {"data": options["data"] | {"frame_window": "start"}})) != bits(whole)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.0.repeats": 3}, "turns of each clip"),
        ({"train.0.caption_prefix": "abc"}, "clips and captions"),
        ({"frame_window": "start"}, "frames: "),
        ({"frame_stride": 2, "num_frames": 3}, "frames: "),
    ],
)
def test_a_resume_with_another_choice_of_data_is_refused(
    run: Run, two: list[Any], changes: dict[str, Any], named: str
) -> None:
    data: dict[str, Any] = {"train": two, "validation": None, "frame_window": "random"}
    options: dict[str, Any] = {"validation": {"prompts": []}, "max_train_steps": 1}
    run(data=data, **options)
    first, second = two
    for name, value in changes.items():
        if name.startswith("train"):
            first = first | {name.split(".")[-1]: value}
        else:
            data = data | {name: value}
    with pytest.raises(MobiusError, match=named):
        run(data=data | {"train": [first, second]}, **options | {"max_train_steps": 2}, resume_from_checkpoint="latest")
