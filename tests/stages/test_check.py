"""All stages are checked before the first step, each with the model of the one before it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from recipes import DS_CONFIGS
from staged import GROWING, write_stages

from mobius_train.engine.ds_config import read_ds_json
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.plan import fit
from mobius_train.stages.check import check_models, check_stages
from mobius_train.stages.recipe import read_stages

pytestmark = pytest.mark.usefixtures("process_group")
SPREAD = Spread.over(1, ds_json=read_ds_json(DS_CONFIGS / "zero2.json"))


def _changed(number: int, **fields: Any) -> list[dict[str, Any]]:
    return [stage | fields if place == number else stage for place, stage in enumerate(GROWING)]


def _check(folder: Path, pipeline: Path, clips: Path, stages: list[dict[str, Any]], **changes: Any) -> None:
    path = write_stages(folder, pipeline, clips, stages, **changes)
    check_stages(read_stages(path), SPREAD, Distributed(SPREAD.launch))


def test_stages_that_can_train_pass_and_leave_nothing(tmp_path: Path, tiny_pipeline: Path, clips_folder: Path) -> None:
    _check(tmp_path, tiny_pipeline, clips_folder, GROWING, gradient_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "stages.yaml"]


@pytest.mark.parametrize(
    ("number", "fields", "words"),
    [
        (2, {"data": {"buckets": [{"num_frames": 4, "width": 30, "height": 32}]}}, "long width=30"),
        (2, {"data": {"train": "nowhere"}}, "long nowhere"),
        (2, {"data": {"buckets": [{"num_frames": 99, "width": 32, "height": 32}]}}, "long 99"),
        (2, {"global_batch_size": 7}, "long global_batch_size=7"),
        (2, {"ring_width": 0.5}, "long ring_width=0.5"),
        (2, {"mode": "serial"}, "long mode='serial'"),
        (2, {"stage": "text-to-image", "data": GROWING[0]["data"]}, "long text-to-image"),
        (1, {"optimizer_state": "kept"}, "short optimizer_state=kept"),
        (1, {"fusion_depth": 9}, "short fusion_depth=9"),
        (1, {"objective": {"flow_shift": 3}}, "short flow_shift"),
    ],
)
def test_a_stage_that_cannot_train_is_named(
    number: int, fields: dict[str, Any], words: str, tmp_path: Path, tiny_pipeline: Path, clips_folder: Path
) -> None:
    with pytest.raises(MobiusError) as refused:
        _check(tmp_path, tiny_pipeline, clips_folder, _changed(number, **fields))
    for word in words.split():
        assert word in str(refused.value)


def test_a_stage_that_does_not_fit_the_gpu_is_named_before_the_first(
    tmp_path: Path, tiny_pipeline: Path, clips_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = {"images": 10, "short": 20, "long": 30}

    def plan(config: Any, *_: Any) -> Any:
        name = config.output_dir.name.partition("-")[2]
        return type("Plan", (), {"allocated": planned[name]})

    monkeypatch.setattr(fit, "plan", plan)
    monkeypatch.setattr(fit, "free_memory", lambda: 30)
    _check(tmp_path, tiny_pipeline, clips_folder, GROWING)  # the control
    monkeypatch.setattr(fit, "free_memory", lambda: 29)
    with pytest.raises(MobiusError, match=r"(?s)^stage long: .*GiB free"):
        _check(tmp_path, tiny_pipeline, clips_folder, GROWING)


@pytest.mark.parametrize("mode", ["parallel", "full"])
def test_pictures_for_a_ring_alone_are_warned_of(
    mode: str, tmp_path: Path, tiny_pipeline: Path, clips_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buckets = [{"num_frames": 4, "width": 32, "height": 32}, {"num_frames": 1, "width": 16, "height": 16}]
    # Clips of 4 frames fit the first bucket alone, so some of 1 frame are added.
    stages = [{"name": "mixed", "max_train_steps": 1, "mode": mode, "data": {"buckets": buckets}}]
    pictures = _with_a_picture(clips_folder, tmp_path / "clips")
    with caplog.at_level(logging.WARNING):
        _check(tmp_path, tiny_pipeline, pictures, stages)
    assert ("one frame" in caplog.text) == (mode == "parallel")


def _with_a_picture(clips: Path, copy: Path) -> Path:
    shutil.copytree(clips, copy)
    for number in range(4):
        Image.new("RGB", (16, 16), "red").save(copy / f"picture{number}.png")
    with (copy / "metadata.jsonl").open("a") as file:
        file.writelines(f'\n{{"file_name": "picture{number}.png", "text": "red"}}' for number in range(4))
    return copy


def test_optimizer_state_is_kept_between_equal_parameters(
    tmp_path: Path, tiny_pipeline: Path, clips_folder: Path
) -> None:
    for mode in ("parallel", "serial", "full"):
        stages = [{"name": name, "max_train_steps": 1, "mode": mode} for name in ("first", "second")]
        stages[1]["optimizer_state"] = "kept"
        check_models(read_stages(write_stages(tmp_path, tiny_pipeline, clips_folder, stages)))


@pytest.mark.slow
def test_the_tool_plans_the_memory_of_every_stage(
    tmp_path: Path,
    tiny_pipeline: Path,
    clips_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the tool replaces it
    from plan_memory import main

    def tool(stages: list[dict[str, Any]], *arguments: str) -> None:
        path = write_stages(tmp_path, tiny_pipeline, clips_folder, stages)
        options = ["--stages", str(path), "--no-search", "--gpu", "0.5", *arguments]
        monkeypatch.setattr(sys, "argv", ["plan_memory.py", *options])
        with pytest.raises(MobiusError, match=r"^stage \w+ needs \d+ MiB more than"):
            main()

    tool(GROWING, "--json", "stages.long.train_batch_size=8")
    plans = json.loads(capsys.readouterr().out)
    assert list(plans) == ["images", "short", "long"]
    assert plans["short"]["peak"] < plans["long"]["peak"]
    tool(GROWING[1:2])
    assert capsys.readouterr().out.startswith("stage short\n")
