"""Resumes with another batch, precision or learning rate: refused with their cost, or accepted by a flag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import IDENTITY, Numbers, make, seal

from mobius_train.checkpoint.accepted import COSTS, Accepted
from mobius_train.checkpoint.resume import find, is_of_another_run, resume
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed

STEP_4 = {"progress": {"step": 4, "samples_seen": 32}}


def test_another_batch_goes_on_after_whole_steps(
    tmp_path: Path, alone: Distributed, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, 4, ranks=1, **STEP_4)
    other = replace(IDENTITY, global_batch_size=12)
    engine = Numbers()
    with pytest.raises(MobiusError, match=r"8 samples per step.*12.*resume_with_changed_batch=true") as error:
        resume(folder, engine, other, alone)
    assert COSTS["batch"] in str(error.value)
    assert engine.step == 0, "nothing is loaded"
    # 32 samples are no whole number of steps of 12, and 36 are.
    assert resume(folder, engine, other, alone, Accepted(batch=True)) == {"step": 4, "samples_seen": 36}
    assert "4 samples are left out" in capsys.readouterr().out
    assert engine.step == 4
    halved = replace(IDENTITY, global_batch_size=4)
    assert resume(folder, engine, halved, alone, Accepted(batch=True)) == {"step": 4, "samples_seen": 32}


def test_another_learning_rate(tmp_path: Path, alone: Distributed, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path, 4, ranks=1)
    (folder / "config.yaml").write_text("seed: 2\nlearning_rate: 0.1\nlr_scheduler: cosine\n")
    seal(folder)
    same = replace(IDENTITY, config="seed: 2\nlearning_rate: 0.1\nlr_scheduler: cosine\nmax_train_steps: 9\n")
    resume(folder, Numbers(), same, alone)
    other = replace(IDENTITY, config="seed: 2\nlearning_rate: 0.2\nlr_scheduler: cosine\n")
    with pytest.raises(MobiusError, match=r"learning_rate was 0\.1, now 0\.2\. .*changed_learning_rate=true") as error:
        resume(folder, Numbers(), other, alone)
    assert COSTS["learning_rate"] in str(error.value)
    capsys.readouterr()
    resume(folder, Numbers(), other, alone, Accepted(learning_rate=True))
    assert f"as resume_with_changed_learning_rate allows: {COSTS['learning_rate']}" in capsys.readouterr().out


class Scaled(Numbers):
    """An engine in fp16, with a loss scale."""

    scale = 65536

    def scalars(self) -> dict[str, int | float]:
        return super().scalars() | {"cur_scale": self.scale}

    def restore(self, fill: Any, scalars: Any) -> None:
        super().restore(fill, scalars)
        self.scale = scalars["cur_scale"]


def test_another_precision_keeps_the_float32_state_and_begins_its_loss_scale_anew(
    tmp_path: Path, alone: Distributed, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, 4, ranks=1)
    engine = Scaled(precision="fp16")
    with pytest.raises(MobiusError, match=r"mixed_precision='no'.*'fp16'.*resume_with_changed_precision=true"):
        resume(folder, engine, IDENTITY, alone)
    resume(folder, engine, IDENTITY, alone, Accepted(precision=True))
    assert (engine.step, engine.scale) == (4, 65536)
    assert all(torch.equal(data, Numbers(4).state[name]) for name, data in engine.state.items())
    assert COSTS["precision"] in capsys.readouterr().out
    # Back again: the scale of fp16 means nothing in float32.
    resume(folder, Numbers(), IDENTITY, alone)


def test_another_precision_hides_no_other_frozen_weights(tmp_path: Path, alone: Distributed) -> None:
    folder = make(tmp_path, 4, ranks=1)
    recipe = Path(__file__).parents[2] / "configs" / "sd21.yaml"
    (folder / "config.yaml").write_text(recipe.read_text())  # bf16
    seal(folder)
    asked: list[torch.dtype] = []

    def hash_in(value: str) -> Callable[[torch.dtype], str]:
        def answer(dtype: torch.dtype) -> str:
            asked.append(dtype)
            return value

        return answer

    # The hash of the same weights in float32.
    rounded = replace(IDENTITY, frozen_sha256="1" * 64, config=recipe.read_text())
    with pytest.raises(MobiusError, match=r"other frozen weights.*resume_with_changed_precision=true"):
        resume(folder, Numbers(), rounded, alone, Accepted(), hash_in("0" * 64))
    resume(folder, Numbers(), rounded, alone, Accepted(precision=True), hash_in("0" * 64))
    assert asked == [torch.bfloat16]
    with pytest.raises(MobiusError, match="other frozen weights"):
        resume(folder, Numbers(), rounded, alone, Accepted(precision=True), hash_in("2" * 64))


def test_a_path_names_a_checkpoint_of_any_run(
    tmp_path: Path, alone: Distributed, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for step in (1, 2):
        make(theirs, step)
    make(ours, 7)
    assert find(ours, str(theirs), alone) == theirs / "checkpoint-2"
    assert find(ours, str(theirs / "checkpoint-1"), alone) == theirs / "checkpoint-1"
    assert find(ours, "latest", alone) == ours / "checkpoint-7"
    with pytest.raises(MobiusError, match=r"no such checkpoint in .*theirs"):
        find(ours, str(theirs / "checkpoint-3"), alone)
    with pytest.raises(MobiusError, match=r"there is no folder .*nowhere"):
        find(ours, str(tmp_path / "nowhere" / "checkpoint-3"), alone)
    monkeypatch.chdir(tmp_path)
    assert is_of_another_run(ours, "theirs/checkpoint-1")
    assert not is_of_another_run(ours, "ours/checkpoint-7")
    assert not is_of_another_run(ours, "checkpoint-7")
