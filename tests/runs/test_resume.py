"""Going on with a run as if it had never stopped: after any step, on other ranks, after kills."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import REPOSITORY, clean_environment
from recipes import DEEP, Run, losses, metrics, recipe, start, write

from mobius_train.errors import MobiusError

RING = Path("final", "unet", "ring", "diffusion_pytorch_model.safetensors")
# As for ranks from the start, see test_ranks.py: the order of float32 sums differs.
TOLERANCE = 1e-5


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
@pytest.mark.parametrize(
    ("ds_config", "accumulation", "steps", "shape"),
    [("zero2", 2, (1, 2, 3), {}), ("zero0", 1, (2,), {}), ("zero1", 1, (2,), DEEP), (None, 2, (2,), DEEP)],
    ids=["zero2", "zero0", "zero1", "fsdp"],
)
def test_after_any_step_losses_and_weights_go_on_bit_for_bit(
    run: Run,
    tmp_path: Path,
    ds_config: str | None,
    accumulation: int,
    steps: tuple[int, ...],
    shape: dict[str, Any],
) -> None:
    options: dict[str, Any] = {
        "ds_config": ds_config,
        "gradient_accumulation_steps": accumulation,
        "use_ema": True,
        "checkpointing_steps": 1,
        "validation_steps": 2,
        "lr_scheduler": "cosine",
        "validation": {"prompts": []},
        **shape,
    }
    whole = run("whole", **options)
    expected = (whole / RING).read_bytes()
    for step in steps:
        parts = _only(whole, step, tmp_path / str(step))
        run(parts.name, resume_from_checkpoint="latest", **options)
        assert (parts / RING).read_bytes() == expected, step
        # Wall-clock times apart, the metrics are those of the whole run, each once.
        assert _without_times(parts) == _without_times(whole), step
    if ds_config == "zero0":
        # The control: another seed ends elsewhere.
        assert (run("other", **options, seed=1) / RING).read_bytes() != expected


def _without_times(output: Path) -> list[dict[str, float]]:
    times = ("samples_per_second", "data_wait_share", "memory_gb")
    return [{name: value for name, value in line.items() if name not in times} for line in metrics(output)]


@pytest.mark.slow
def test_a_resume_of_no_run_in_particular_is_refused(run: Run) -> None:
    with pytest.raises(MobiusError, match=r"resume_from_checkpoint=latest.*output_dir"):
        run("emoji-{time}", resume_from_checkpoint="latest")


@pytest.mark.slow
def test_a_resume_with_another_global_batch_says_what_to_set(run: Run) -> None:
    run(checkpointing_steps=2, max_train_steps=2)
    with pytest.raises(MobiusError, match=r"train_batch_size.*gradient_accumulation_steps.*\b2\b"):
        run(checkpointing_steps=2, resume_from_checkpoint="latest", train_batch_size=4)


@pytest.mark.slow
def test_a_resume_with_a_ring_of_another_shape_is_refused_by_name(run: Run) -> None:
    run(checkpointing_steps=2, max_train_steps=2, **DEEP)
    for changes in ({"ring_width": 1.0}, {"fusion_depth": 2}, {"ring_width": None}):
        with pytest.raises(MobiusError, match=r"ring_width=0\.5, fusion_depth=1.*this run has ring_width"):
            run(checkpointing_steps=2, resume_from_checkpoint="latest", **DEEP | changes)


@pytest.mark.distributed
def test_a_run_moves_from_two_ranks_to_four_to_one_and_between_zero_stages(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    values = recipe(
        tiny_pipeline,
        clips_folder,
        tmp_path / "moved",
        max_train_steps=6,
        use_ema=True,
        checkpointing_steps=2,
        deterministic=True,
        validation={"prompts": []},
    )
    path = write(tmp_path / "recipe.yaml", values)
    whole = start(path, f"output_dir={tmp_path / 'whole'}", "train_batch_size=4", launcher="ranks")
    assert whole.returncode == 0, whole.stderr[-3000:]
    latest: tuple[str, ...] = ()
    for ranks, ds_config, steps in ((2, "zero1", 2), (4, "zero3", 4), (1, "zero2", 6)):
        batch = (f"train_batch_size={4 // ranks}", f"max_train_steps={steps}")
        result = start(path, *batch, *latest, ranks=ranks, ds_config=ds_config, launcher="ranks")
        assert result.returncode == 0, result.stderr[-3000:]
        latest = ("resume_from_checkpoint=latest",)
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=TOLERANCE)
    ends = [metrics(tmp_path / name)[-1]["heldout_loss"] for name in ("moved", "whole")]
    assert ends[0] == pytest.approx(ends[1], rel=TOLERANCE)


@pytest.mark.distributed
def test_killed_at_random_instants_a_run_ends_as_if_it_had_not_been(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    values = recipe(
        tiny_pipeline,
        clips_folder,
        tmp_path / "unused",
        max_train_steps=24,
        use_ema=True,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        validation={"prompts": []},
    )
    script, record = REPOSITORY / "benchmarks" / "kill_resume.py", tmp_path / "record.json"
    arguments = ["--config", str(write(tmp_path / "recipe.yaml", values)), "--record", str(record)]
    result = subprocess.run(
        [sys.executable, str(script), *arguments, "--ranks", "2", "--kills", "2", "--longest", "0.3"],
        capture_output=True,
        text=True,
        timeout=600,
        env=clean_environment(HF_HUB_OFFLINE="1"),
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    found = json.loads(record.read_text())["results"]
    assert found["kills"] == 2
    assert found["losses_equal"]
    assert found["final_weights_equal"]


@pytest.mark.slow
def test_a_resume_with_other_clips_is_refused_by_name(run: Run, tmp_path: Path, clips_folder: Path) -> None:
    clips = shutil.copytree(clips_folder, tmp_path / "clips")
    options: dict[str, Any] = {"data": {"train": str(clips)}, "checkpointing_steps": 2, "validation": {"prompts": []}}
    run(max_train_steps=2, **options)
    resumed = options | {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    run(**resumed)  # the control
    lines = (clips / "metadata.jsonl").read_text().splitlines()
    (clips / "metadata.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    last = json.loads(lines[-1])["file_name"]
    (clips / last).unlink()
    resumed["max_train_steps"] = 4
    with pytest.raises(MobiusError, match="clips and captions: "):
        run(**resumed)
    with pytest.raises(MobiusError, match="seed: 0, now 1"):
        run(**resumed, seed=1)
    run(**resumed, seed=1, resume_with_changed_data=True)
