"""Going on with a run as if it had never stopped: after any step, after kills. test_ranks.py: on other ranks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import kill_resume
import pytest
import torch
from diffusers import UNet2DConditionModel
from launching import LAUNCHER_VARIABLES, REPOSITORY
from recipes import DEEP, Run, losses, metrics, recipe, write
from safetensors.torch import load_file

from mobius_train.errors import MobiusError

# Small and quick: no held-out loss, no samples.
QUIET: dict[str, Any] = {
    "validation": {"prompts": []},
    "data": {"validation": None, "resolution": 16, "num_frames": 2},
    **DEEP,
}
RING = Path("final", "unet", "ring", "diffusion_pytorch_model.safetensors")


def _only(folder: Path, step: int, copy: Path) -> Path:
    """A copy of a run that was stopped right after the checkpoint of this step."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "final")
    for checkpoint in copy.glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)
    (copy / "latest").write_text(f"checkpoint-{step}\n")
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("ds_config", ["zero2", None], ids=["zero2", "fsdp"])
def test_a_run_with_its_frozen_branch_ahead_is_the_same_bit_for_bit(
    run: Run, tmp_path: Path, ds_config: str | None
) -> None:
    """Losses, weights, and a resume with and without it."""
    options: dict[str, Any] = {
        "ds_config": ds_config,
        "max_train_steps": 3,
        "gradient_accumulation_steps": 2,
        "checkpointing_steps": 1,
        "validation_steps": 1,
        **QUIET,
    }
    plain, ahead = run("plain", **options), run("ahead", frozen_ahead=True, **options)
    assert losses(ahead) == losses(plain)
    assert len(set(losses(plain))) == 3
    expected = (plain / RING).read_bytes()
    assert (ahead / RING).read_bytes() == expected
    for source, frozen_ahead in ((plain, True), (ahead, False)):
        resumed = _only(source, 1, tmp_path / f"from-{source.name}")
        run(resumed.name, resume_from_checkpoint="latest", frozen_ahead=frozen_ahead, **options)
        assert (resumed / RING).read_bytes() == expected


@pytest.mark.slow
def test_a_run_with_frozen_weights_of_eight_bits_exports_the_original_ones(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it goes on without them, which is a change that is named."""
    options: dict[str, Any] = {"max_train_steps": 2, "checkpointing_steps": 1, "mixed_precision": "bf16", **QUIET}
    plain, eight = run("plain", **options), run("eight", frozen_int8=True, **options)
    assert losses(eight) == pytest.approx(losses(plain), rel=0.02)
    assert losses(eight) != losses(plain)
    weights = [
        load_file(folder / "final/unet/spatial/diffusion_pytorch_model.safetensors") for folder in (plain, eight)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    again, other = _only(eight, 1, tmp_path / "again"), _only(eight, 1, tmp_path / "other")
    run("again", frozen_int8=True, resume_from_checkpoint="latest", **options)
    assert (again / RING).read_bytes() == (eight / RING).read_bytes()
    assert "frozen_int8" not in capsys.readouterr().out
    run("other", resume_from_checkpoint="latest", **options)
    assert "other than before: frozen_int8 was True, now False" in capsys.readouterr().out
    assert (other / RING).read_bytes() != (eight / RING).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ds_config", "steps", "options"),
    [
        ("zero2", (1, 2), {"max_train_steps": 3, "gradient_accumulation_steps": 2}),
        (None, (1,), {"max_train_steps": 2, "trained_tail": True, **DEEP}),
    ],
    ids=["zero2", "fsdp"],
)
def test_after_any_step_losses_and_weights_go_on_bit_for_bit(
    run: Run, tmp_path: Path, ds_config: str | None, steps: tuple[int, ...], options: dict[str, Any]
) -> None:
    """`tests/engine/test_engines.py` has the other engines, `test_staged.py` all at once."""
    options |= {
        "ds_config": ds_config,
        "use_ema": True,
        "checkpointing_steps": 1,
        "validation_steps": 2,
        "lr_scheduler": "cosine",
        "validation": {"prompts": []},
        "data": {"resolution": 16, "num_frames": 2},
    }
    whole = run("whole", **options)
    expected = (whole / RING).read_bytes()
    for step in steps:
        parts = _only(whole, step, tmp_path / str(step))
        run(parts.name, resume_from_checkpoint="latest", **options)
        assert (parts / RING).read_bytes() == expected, step
        # Wall-clock times apart, the metrics are those of the whole run, each once.
        assert _without_times(parts) == _without_times(whole), step
    if ds_config is None:
        # The control: another seed goes and ends elsewhere.
        other = run("other", **options, seed=1)
        assert (other / RING).read_bytes() != expected
        assert losses(other) != losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("ds_config", ["zero3", None], ids=["zero3", "fsdp"])
def test_recomputed_activations_change_no_bit_where_weights_are_gathered(
    run: Run, tmp_path: Path, ds_config: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a resume: its first step gathers weights in other places than a new run's."""
    # ZeRO-3 puts a function of its own in its place, for the rest of the process.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    options: dict[str, Any] = {
        "ds_config": ds_config,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "trained_tail": True,
        **QUIET,
    }
    expected = (run("kept", **options) / RING).read_bytes()
    options["recompute_activations"] = True
    recomputed = run("recomputed", **options)
    assert (recomputed / RING).read_bytes() == expected
    resumed = _only(recomputed, 1, tmp_path / "resumed")
    run("resumed", resume_from_checkpoint="latest", **options)
    assert (resumed / RING).read_bytes() == expected


def _without_times(output: Path) -> list[dict[str, float]]:
    times = ("samples_per_second", "data_wait_share", "memory_gb")
    return [{name: value for name, value in line.items() if name not in times} for line in metrics(output)]


@pytest.mark.slow
def test_a_resume_of_no_run_in_particular_is_refused(run: Run) -> None:
    with pytest.raises(MobiusError, match=r"resume_from_checkpoint=latest.*output_dir"):
        run("emoji-{time}", resume_from_checkpoint="latest")


@pytest.mark.slow
def test_a_resume_as_another_run_is_refused_by_name(run: Run, tmp_path: Path, tiny_pipeline: Path) -> None:
    options: dict[str, Any] = {"max_train_steps": 1, "validation": {"prompts": []}, **DEEP}
    run(**options)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(MobiusError, match=message):
            run(resume_from_checkpoint="latest", **options | {"max_train_steps": 2} | changes)

    refused(r"train_batch_size.*gradient_accumulation_steps.*\b2\b", train_batch_size=4)
    for changes in ({"fusion_depth": 2}, {"ring_width": None}):
        refused(r"ring_width=0\.5, fusion_depth=1.*this run has ring_width", **changes)
    random = dict(UNet2DConditionModel.load_config(tiny_pipeline / "unet"))
    refused(r"frozen.*pretrained_model_name_or_path", unet_config=random, seed=7)
    run(resume_from_checkpoint="latest", **options | {"max_train_steps": 2})  # the control


@pytest.mark.distributed
def test_killed_at_random_instants_a_run_ends_as_if_it_had_not_been(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe(
        tiny_pipeline,
        clips_folder,
        tmp_path / "unused",
        max_train_steps=8,
        use_ema=True,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        validation={"prompts": []},
    )
    record = tmp_path / "record.json"
    arguments = ["--config", str(write(tmp_path / "recipe.yaml", values)), "--record", str(record)]
    options = ["--ranks=2", "--kills=2", "--longest=0.3", "--preloaded"]
    monkeypatch.setattr(sys, "argv", ["kill_resume.py", *arguments, *options])
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    kill_resume.main()
    found = json.loads(record.read_text())["total"]
    assert found["kills"] == 2
    assert found["losses_equal"]
    assert found["final_weights_equal"]


@pytest.mark.slow
def test_a_resume_with_other_clips_is_refused_by_name(run: Run, tmp_path: Path, clips_folder: Path) -> None:
    clips = shutil.copytree(clips_folder, tmp_path / "clips")
    data = {"train": str(clips), "validation": None, "resolution": 16, "num_frames": 2}
    options: dict[str, Any] = {"data": data, "validation": {"prompts": []}}
    run(max_train_steps=1, **options)
    resumed = options | {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    run(**resumed)  # the control
    lines = (clips / "metadata.jsonl").read_text().splitlines()
    (clips / "metadata.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    last = json.loads(lines[-1])["file_name"]
    (clips / last).unlink()
    resumed["max_train_steps"] = 3
    with pytest.raises(MobiusError, match="clips and captions: "):
        run(**resumed)
    with pytest.raises(MobiusError, match="seed: 0, now 1"):
        run(**resumed, seed=1)
    run(**resumed, seed=1, resume_with_changed_data=True)


@pytest.mark.slow
def test_a_path_goes_on_with_another_run_in_a_new_folder(run: Run) -> None:
    options = QUIET | {"max_train_steps": 3, "checkpointing_steps": 1}
    whole = run("whole", **options)
    run("other-{time}", **options, resume_from_checkpoint=str(whole / "checkpoint-1"))
    [other] = whole.parent.glob("other-2*")
    assert (other / RING).read_bytes() == (whole / RING).read_bytes()
    assert [line["step"] for line in metrics(other) if "loss" in line] == [2, 3]
    with pytest.raises(MobiusError, match="not empty"):
        run("whole", **options, resume_from_checkpoint=str(other / "checkpoint-2"))


@pytest.mark.slow
def test_a_run_goes_on_with_another_batch_precision_and_learning_rate_if_the_flags_say_so(run: Run) -> None:
    first = run("first", **QUIET, num_train_epochs=1, max_train_steps=None, checkpointing_steps=2)
    assert [line["step"] for line in metrics(first) if "loss" in line] == [1, 2, 3, 4, 5]
    changes: dict[str, Any] = {"train_batch_size": 4, "mixed_precision": "bf16", "learning_rate": 1e-4}
    start: dict[str, Any] = {
        "resume_from_checkpoint": str(first / "checkpoint-2"),
        "num_train_epochs": 1,
        "max_train_steps": None,
    }
    flags = {f"resume_with_changed_{name}": True for name in ("batch", "precision", "learning_rate")}
    for left_out in flags:
        with pytest.raises(MobiusError, match=f"{left_out}=true, which costs: "):
            run("refused", **QUIET, **start, **changes, **flags | {left_out: False})
    second = run("second", **QUIET, **start, **changes, **flags)
    # Of the epoch's ten samples four are seen, and two steps of four have the others.
    assert [line["step"] for line in metrics(second) if "loss" in line] == [3, 4]
    assert {line["learning_rate"] for line in metrics(second) if "loss" in line} == {1e-4}
    backbone = {"unet_config": dict(UNet2DConditionModel.load_config(second / "final" / "unet" / "spatial")), "seed": 7}
    with pytest.raises(MobiusError, match="other frozen weights"):
        run("other", **QUIET, **start, **changes, **flags, **backbone, resume_with_changed_data=True)
