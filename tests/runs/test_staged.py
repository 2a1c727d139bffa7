"""Stages are trained one after the other by one command, which goes on after any kill and stop."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import LAUNCHER_VARIABLES, launch
from recipes import DS_CONFIGS, losses
from safetensors.torch import load_file
from staged import GROWING, write_stages

from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.engine.spread import spread_of
from mobius_train.errors import Interrupted, MobiusError, Stopped
from mobius_train.job import environment
from mobius_train.pipeline import TextToVideoPipeline
from mobius_train.stages.recipe import read_stages
from mobius_train.stages.train import dry_run_stages, train_stages
from mobius_train.trainer import Trainer

WORKER = Path(__file__).with_name("staged_worker.py")
FOLDERS = ("1-images", "2-short", "3-long")


def _weights(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.glob("*-*/final/unet/**/*.safetensors")}


Staged = Callable[..., Path]


@pytest.fixture
def staged(
    tiny_pipeline: Path,
    clips_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    process_group: None,
) -> Staged:
    """Train stages in this process; returns their output folder."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def start(
        stages: list[dict[str, Any]],
        *overrides: str,
        act: Callable[..., None] = train_stages,
        fsdp: bool = False,
        **changes: Any,
    ) -> Path:
        monkeypatch.delenv("MASTER_PORT", raising=False)
        path = write_stages(tmp_path, tiny_pipeline, clips_folder, stages, **changes)
        launched = environment.prepare()
        spread = spread_of("deepspeed", DS_CONFIGS / "zero2.json", launched)
        if fsdp:
            spread = spread_of("fsdp", None, launched)
        stages_read = read_stages(path, overrides)
        act(stages_read, spread)
        return stages_read.output_dir

    return start


@pytest.mark.distributed
def test_killed_at_a_random_step_of_each_stage_the_end_is_that_of_an_undisturbed_training(
    staged: Staged, tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    stages = [stage | {"max_train_steps": 2} for stage in GROWING]
    path = write_stages(tmp_path, tiny_pipeline, clips_folder, stages, use_ema=True, train_batch_size=1)

    def train(output: str, kill: str = "-", *overrides: str) -> subprocess.CompletedProcess[str]:
        arguments = ["--stages", str(path), "--deepspeed", str(DS_CONFIGS / "zero2.json")]
        return launch(2, WORKER, kill, *arguments, f"output_dir={tmp_path / output}", *overrides, HF_HUB_OFFLINE="1")

    # The killed starts have no data workers: under the tests' fork server these would outlive their rank.
    whole = train("whole", "-", "data.dataloader_num_workers=1")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert whole.stdout.count("workers left: 0") == 2 * 3
    chance = random.Random(15)
    for stage in (1, 2, 3):
        kill = f"{stage}:{chance.randrange(2)}"
        killed = train("parts", kill)
        assert killed.returncode != 0, kill
        statuses = [one["status"] for one in json.loads((tmp_path / "parts" / "stages.json").read_text())["stages"]]
        assert statuses == ["finished"] * (stage - 1) + ["running"], killed.stderr[-3000:]
    result = train("parts")
    assert result.returncode == 0, result.stderr[-3000:]
    expected = _weights(tmp_path / "whole")
    assert len(expected) == 5
    assert _weights(tmp_path / "parts") == expected
    for folder in FOLDERS:
        assert losses(tmp_path / "parts" / folder) == losses(tmp_path / "whole" / folder)
        assert len(losses(tmp_path / "parts" / folder)) == 2
    # The last final/ is the training's.
    assert (tmp_path / "whole" / "final").resolve() == (tmp_path / "whole" / "3-long" / "final").resolve()
    # The control: a finished stage that was edited.
    with pytest.raises(MobiusError, match=r"(?s)stage short is finished, .*: learning_rate was 0\.001, now 0\.5"):
        staged(
            stages,
            f"output_dir={tmp_path / 'parts'}",
            "stages.short.learning_rate=0.5",
            use_ema=True,
            train_batch_size=1,
        )


TWO = [{"name": "first", "max_train_steps": 1}, {"name": "second", "max_train_steps": 2}]


@pytest.mark.slow
@pytest.mark.parametrize(("start_from", "state"), [("weights", "kept"), ("average", "fresh")])
def test_a_stage_starts_from_the_float32_weights_and_the_optimizer_of_the_one_before(
    start_from: str, state: str, staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    train = Trainer.train

    def noting(trainer: Trainer) -> Any:
        starts.append((trainer.engine.weights(), trainer.engine.averaged_weights()))
        return train(trainer)

    monkeypatch.setattr(Trainer, "train", noting)
    # Adam's moments would hide in the first step of a fresh optimizer, so they are read from the checkpoint.
    second = TWO[1] | {"start_from": start_from, "optimizer_state": state, "max_train_steps": 1}
    output = staged([TWO[0], second], use_ema=True, ema_decay=0.5, mixed_precision="no")
    before = open_checkpoint(output / "1-first" / "checkpoint-1")
    expected, other = (dict(before.weights(averaged=start_from == name)) for name in ("average", "weights"))
    for found in starts[1]:
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
    assert any(not torch.equal(expected[name], other[name]) for name in expected)  # the control
    after = open_checkpoint(output / "2-second" / "checkpoint-1")
    assert after.state.scalars["adam_step"] == (2 if state == "kept" else 1)
    assert after.state.progress["step"] == 1
    # A new stage has noise of its own.
    seeds = [open_checkpoint(folder).config["seed"] for folder in (before.folder, after.folder)]
    assert seeds == [1, 2]


@pytest.mark.slow
def test_weights_in_16_bits_are_not_what_the_next_stage_starts_from(
    staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    train = Trainer.train

    def noting(trainer: Trainer) -> Any:
        starts.append(trainer.engine.weights())
        return train(trainer)

    monkeypatch.setattr(Trainer, "train", noting)
    one = {"max_train_steps": 1}
    data = {"data": {"buckets": [{"num_frames": 2, "width": 16, "height": 16}], "validation": None}}
    output = staged([TWO[0] | one | data, TWO[1] | one | data], mixed_precision="bf16", train_batch_size=1, fsdp=True)
    rounded = load_file(output / "1-first" / "final" / "unet" / "ring" / "diffusion_pytorch_model.safetensors")
    saved = dict(open_checkpoint(output / "1-first" / "checkpoint-1").weights())
    assert all(torch.equal(tensor, saved[name]) for name, tensor in starts[1].items())
    assert any(not torch.equal(tensor.float(), saved[name]) for name, tensor in rounded.items() if name in saved)


@pytest.mark.slow
def test_a_stop_in_the_middle_and_between_stages_goes_on_by_the_same_command(
    staged: Staged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = staged(TWO, f"output_dir={tmp_path / 'whole'}")
    output, step_of_trainer, export = tmp_path / "out", Trainer._step, Trainer._export

    def asked(trainer: Trainer, batches: Any) -> dict[str, float]:
        if trainer.output_dir.name == "2-second":
            (output / "stop").touch()
        return step_of_trainer(trainer, batches)

    def at_the_end(trainer: Trainer, *shown: Any) -> None:
        export(trainer, *shown)
        (output / "stop").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_export", at_the_end)
        with pytest.raises(Interrupted):
            staged(TWO)
    assert (output / "stopped").read_text() == "0\n"
    assert sorted(path.name for path in output.iterdir()) == ["1-first", "stages.json", "stopped"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", asked)
        with pytest.raises(Stopped):
            staged(TWO)
    assert (output / "stopped").read_text() == "1\n"
    assert not (output / "stop").exists()
    # A change that a resume accepts goes on, another is refused with what was changed.
    with pytest.raises(
        MobiusError, match=r"^stage second: (?s:.*)changed since the stage began: train_batch_size was 2"
    ):
        staged(TWO, "stages.second.train_batch_size=1")
    staged(TWO, "stages.second.max_train_steps=2")
    assert not (output / "stopped").exists()
    assert _weights(output) == _weights(whole)
    assert TextToVideoPipeline.from_pretrained(output / "final").unet is not None
    # All are finished: nothing is done again.
    before = (output / "stages.json").stat().st_mtime_ns
    staged(TWO)
    assert (output / "stages.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_dry_run_tries_every_stage_and_leaves_nothing(
    staged: Staged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staged(GROWING, act=dry_run_stages)
    assert capsys.readouterr().out.count("nothing was written") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "stages.yaml"]
