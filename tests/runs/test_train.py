"""Whole runs on tiny models, in this process: what a run leaves, resuming, and what bad input gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from recipes import Run, losses, metrics
from safetensors import SafetensorError
from safetensors.torch import load_file

from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.checkpoint.saver import Saver
from mobius_train.config import load
from mobius_train.errors import MobiusError
from mobius_train.plan import out_of_memory
from mobius_train.tasks.denoising import DiffusionTask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]


def test_a_run_leaves_what_the_documentation_says(run: Run, tiny_pipeline: Path) -> None:
    output = run(use_ema=True, checkpointing_steps=2, checkpoints_total_limit=1, validation_steps=2)
    assert {path.name for path in output.iterdir()} == {
        "config.yaml",
        "overview.txt",
        "report.html",
        "metrics.jsonl",
        "logs",
        "samples",
        "checkpoint-4",
        "latest",
        "final",
    }
    assert sorted(path.name for path in (output / "samples").iterdir()) == ["step-2", "step-4"]
    shown = {path.suffix for path in (output / "samples" / "step-4").iterdir()}
    assert shown == {".gif", ".mp4", ".png", ".jsonl"}
    steps = [line for line in metrics(output) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line["step_applied"] == 1 and line["gradient_norm"] > 0 for line in steps)
    assert [line["step"] for line in metrics(output) if "heldout_loss" in line] == [0, 2, 4]
    assert load(output / "config.yaml").output_dir == output
    assert any((output / "logs").iterdir())

    # Checkpoints and final/ hold the ring apart from an unchanged backbone.
    backbone = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").state_dict()
    saved = load_file(output / "final" / "unet" / "spatial" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in backbone.items())
    shapes = {tuple(tensor.shape) for tensor in backbone.values() if tensor.ndim == 4}
    names = {name for name, _ in open_checkpoint(output / "checkpoint-4").weights()}
    assert any("temp_convs" in name for name in names)
    assert not any("resnets" in name or "time_embedding" in name for name in names)
    assert shapes  # the backbone has weights that could have been found


def test_stage_one_trains_a_unet_that_stage_two_takes(run: Run, tmp_path: Path) -> None:
    output = run(
        "t2i",
        stage="text-to-image",
        data={"random_frame": True, "cache_dir": str(tmp_path / "cache")},
        max_train_steps=2,
    )
    assert isinstance(UNet2DConditionModel.from_pretrained(output / "final" / "unet"), UNet2DConditionModel)
    assert list((output / "samples" / "step-2").glob("*.png"))
    following = run("t2v", pretrained_model_name_or_path=str(output / "final"), max_train_steps=1)
    assert len(losses(following)) == 1


def test_the_autoencoder_stage(run: Run, tiny_pipeline: Path) -> None:
    output = run(stage="autoencoder", data={"random_frame": True}, use_ema=True)
    vae = AutoencoderKL.from_pretrained(output / "final" / "vae")
    assert vae.config.scaling_factor != 0.18215
    assert (output / "samples" / "step-4" / "reconstructions.png").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "autoencoder", "data": {"random_frame": True}},
        {"stage": "text-to-image", "data": {"random_frame": True}},
        {"mode": "serial"},
        {"mode": "full", "gradient_checkpointing": True},
        {"mode": "parallel", "gradient_checkpointing": True},
        {"mode": "parallel", "mixed_precision": "bf16"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values()))[:30],
)
def test_fsdp_trains_every_stage_and_mode_as_deepspeed_does(
    run: Run, tiny_pipeline: Path, changes: dict[str, Any]
) -> None:
    small = {"resolution": 16, "num_frames": 2} | changes.get("data", {})
    options = {"max_train_steps": 2, "validation": {"prompts": []}} | changes | {"data": small}
    zero0, fsdp = run("zero0", "zero0", **options), run("fsdp", None, **options)
    assert losses(fsdp) == pytest.approx(losses(zero0), rel=1e-2 if "mixed_precision" in changes else 1e-5)
    mode = changes.get("mode", "parallel")
    if mode != "parallel":
        before = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").state_dict()
        for output in (zero0, fsdp):
            after = load_file(output / "final" / "unet" / "unet" / "diffusion_pytorch_model.safetensors")
            assert any(not torch.equal(before[name], after[name]) for name in before) == (mode == "full")


def test_a_run_of_non_finite_losses_stops_the_job_and_applies_nothing(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MobiusError, match=r"\b3 steps.*learning_rate"):
        # A rate this high makes the weights, and so the loss, overflow after the first step.
        run(learning_rate=1e30, max_skipped_steps=3, max_train_steps=20, max_grad_norm=0.0, adam_epsilon=1.0)
    assert "the loss is nan on clip" in caplog.text or "the loss is inf on clip" in caplog.text


@pytest.mark.parametrize("spoiled", [2, 1])
def test_a_run_that_skipped_every_step_fails_and_writes_no_model(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoiled: int
) -> None:
    loss_of, calls = DiffusionTask.loss, iter(range(99))

    def loss(task: DiffusionTask, engine: Any, batch: Any) -> torch.Tensor:
        factor = float("nan") if next(calls) < spoiled else 1.0
        return loss_of(task, engine, batch) * factor

    monkeypatch.setattr(DiffusionTask, "loss", loss)
    changes: dict[str, Any] = {"max_train_steps": 2, "gradient_accumulation_steps": 1, "validation": {"prompts": []}}
    if spoiled < 2:
        assert (run(**changes) / "final").exists()
        assert "1 of 2 steps" in capsys.readouterr().out
        return
    with pytest.raises(MobiusError, match="all 2 steps"):
        run(**changes)
    assert not (tmp_path / "out" / "final").exists()


def test_a_dry_run_writes_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(dry=True)
    assert not output.exists()
    assert "nothing was written" in capsys.readouterr().out


def _refused(run: Run, message: str, **changes: Any) -> None:
    with pytest.raises(MobiusError, match=message):
        run("refused", **changes)


def test_bad_input_is_refused_and_no_output_folder_is_made(run: Run, tmp_path: Path, tiny_pipeline: Path) -> None:
    _refused(run, "absent", pretrained_model_name_or_path=str(tmp_path / "absent"))
    _refused(run, r"no unet in .*unet/config\.json", pretrained_model_name_or_path=str(tmp_path))
    _refused(
        run,
        "width 100.*384",
        unet_config={"cross_attention_dim": 100, "block_out_channels": [32, 32, 32, 32]},
    )
    _refused(run, "global_batch_size=7", global_batch_size=7)
    _refused(run, r"resolution=30\b.*\b4\b", data={"resolution": 30})
    _refused(run, r"\b4\b.*num_frames", data={"num_frames": 9})
    _refused(run, "resume_from_checkpoint=latest", resume_from_checkpoint="latest")
    (tmp_path / "file").touch()
    _refused(run, r"file\b", data={"cache_dir": str(tmp_path / "file" / "cache")})
    empty = tmp_path / "empty"
    empty.mkdir()
    _refused(run, "empty", data={"train": str(empty)})
    assert not (tmp_path / "refused").exists()


def test_a_folder_with_a_run_in_it_is_not_written_over(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(MobiusError, match=r"out\b.*output_dir"):
        run(max_train_steps=1)
    assert [path.name for path in output.iterdir()] == ["metrics.jsonl"]
    assert (output / "metrics.jsonl").read_text() == "{}\n"


def _full(*arguments: object) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_failed_export_loses_no_step_and_a_resume_exports(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_train_steps": 1, "validation": {"prompts": []}}
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTask, "export", _full)
        with pytest.raises(MobiusError, match=r"final was not written: I/O error.*saved in checkpoint-1"):
            run(**options)
    output = run(resume_from_checkpoint="latest", **options)
    assert len(losses(output)) == 1
    before = sorted(path.name for path in (output / "final").rglob("*"))
    # A run that exports again and fails keeps the old model whole.
    monkeypatch.setattr(DiffusionTask, "export", _full)
    with pytest.raises(MobiusError, match="final was not written"):
        run(resume_from_checkpoint="latest", **options)
    assert sorted(path.name for path in (output / "final").rglob("*")) == before
    assert not list(output.glob(".tmp-*"))


def test_a_last_checkpoint_that_cannot_be_saved_is_a_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Saver, "_write", full)
    with pytest.raises(MobiusError, match=r"final/ is written, but checkpoint-1 was not saved"):
        run(max_train_steps=1, validation={"prompts": []})


def test_a_full_gpu_is_an_error_that_names_the_bucket_the_plan_and_a_remedy(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(DiffusionTask, "loss", full)
    with pytest.raises(
        MobiusError,
        match=r"(?s)step 1, 2 clip.* of 4 frame.* of 32x32 pixels: .*2\.00 GiB.*GiB are planned.*train_batch_size",
    ):
        run(validation={"prompts": []})


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_a_full_gpu_is_named_before_the_first_step_too(run: Run, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def full(*arguments: object) -> None:
        raise RuntimeError(text)

    def unplanned(*arguments: object) -> None:
        raise MobiusError("not planned in this test, which saves seconds")

    monkeypatch.setattr(DiffusionTask, "prepare_data", full)
    monkeypatch.setattr(out_of_memory, "plan", unplanned)
    with pytest.raises(MobiusError, match=rf"memory is full in loading models and data: {text}"):
        run(validation={"prompts": []})
