"""Plans of ranks that share clips."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recipes import REPOSITORY, recipe, write

from mobius_train.config import load
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.plan import Planner, find_gpu
from mobius_train.plan.longest import as_table, longest_clips
from mobius_train.plan.plan_text import as_text


def emoji(*overrides: str) -> Any:
    return load(REPOSITORY / "configs" / "emoji.yaml", overrides)


def test_the_activations_of_a_rank_are_its_share(tiny_pipeline: Path, clips_folder: Path, tmp_path: Path) -> None:
    values = recipe(tiny_pipeline, clips_folder, tmp_path, validation={"prompts": []}, ring_width=0.5)
    del values["data"]["validation"]
    planner, path = Planner(), write(tmp_path / "recipe.yaml", values)
    whole = planner.plan(load(path), Spread.over(1))
    halves = planner.plan(load(path, ["sequence_parallel_size=2"]), Spread.over(2))
    assert sum(halves.saved.values()) == pytest.approx(sum(whole.saved.values()) / 2, rel=0.03)
    assert sum(halves.flops.values()) == pytest.approx(sum(whole.flops.values()) / 2, rel=0.03)
    assert whole.sent is None
    assert halves.sent is not None
    assert halves.sent.bytes["exchange"] > 1e5
    assert "sent to the ranks that share" in as_text(halves, {}, [])


class Line(Planner):
    """Peaks that are proportional to a rank's share of the frames, of a model that takes at most 1000."""

    def plan(self, config: Any, spread: Spread, gpu: Any = None) -> Any:
        assert spread.ranks == config.sequence_parallel_size
        if config.data.num_frames > 1000:
            raise MobiusError("too many frames")
        return SimpleNamespace(peak=2**30 + config.data.num_frames * 2**26 // spread.ranks)


def test_the_longest_clip_of_each_gpu_and_number_of_gpus() -> None:
    gpus = [find_gpu("0.5"), find_gpu("1.05"), find_gpu("3"), find_gpu("9")]
    found = longest_clips(Line(), emoji(), Spread.over, gpus)
    assert list(found.values()) == [
        {1: None, 2: None, 4: None, 8: None},
        # Three frames would fit on four GPUs and six on eight, but each GPU needs a frame.
        {1: None, 2: None, 4: None, 8: None},
        {1: 32, 2: 64, 4: 128, 8: 256},
        {1: 128, 2: 256, 4: 512, 8: 1000},
    ]
    first, _, second, _ = as_table(found).splitlines()[1:]
    assert first.split()[-4:] == ["-"] * 4
    assert second.split()[-4:] == ["32", "64", "128", "256"]


def test_the_end_of_the_search_is_marked() -> None:
    assert as_table({"large": {1: 1023, 2: 1024, 4: 1024, 8: None}}).split()[-4:] == ["1023", "1024+", "1024+", "-"]


def test_buckets_set_the_frames() -> None:
    buckets = [{"num_frames": 8, "width": 64, "height": 64}]
    with pytest.raises(MobiusError, match=r"without data\.buckets"):
        longest_clips(Line(), emoji(f"data.buckets={buckets}"), Spread.over, [find_gpu("9")])
