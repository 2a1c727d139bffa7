"""Runs whose ranks share clips: the same losses, samples and checkpoints as one rank's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launching import launch
from PIL import Image
from recipes import DEEP, DS_CONFIGS, losses, metrics, recipe, write

WORKER = Path(__file__).parents[1] / "runs" / "ranks_worker.py"
SHARED = "+sequence_parallel_size=2"
# Of rounding, as in tests/runs/test_ranks.py.
TOLERANCE = 1e-5


def run(ranks: int, recipe_path: Path, output: Path, *runs: str) -> None:
    result = launch(ranks, WORKER, str(recipe_path), str(output), str(DS_CONFIGS), *runs, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def heldout(folder: Path) -> list[float]:
    return [line["heldout_loss"] for line in metrics(folder) if "heldout_loss" in line]


@pytest.mark.distributed
def test_under_every_engine_a_shared_clip_trains_as_one_ranks(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "unused", max_train_steps=3, use_ema=True, **DEEP)
    path = write(tmp_path / "recipe.yaml", values)
    run(1, path, tmp_path, "zero0")
    silent = "+validation.prompts=[]"
    two = [f"zero2{SHARED}+train_batch_size=4"]
    two += [f"{engine}{SHARED}+train_batch_size=4{silent}" for engine in ("zero3", "fsdp+shard_frozen=true")]
    # Two groups with two clips each, in two micro-batches.
    four = [f"zero1{SHARED}{silent}+train_batch_size=1+gradient_accumulation_steps=2"]
    run(2, path, tmp_path, *two)
    run(4, path, tmp_path, *four)
    reference = tmp_path / "zero0"
    assert len(set(losses(reference))) == 3
    for name in (*two, *four):
        assert losses(tmp_path / name) == pytest.approx(losses(reference), rel=TOLERANCE), name
        assert heldout(tmp_path / name) == pytest.approx(heldout(reference), rel=TOLERANCE), name
        assert (tmp_path / name / "final" / "model_index.json").is_file()
    drawn, alone = (
        np.asarray(Image.open(tmp_path / name / "samples" / "step-3" / "00-dog-number-3.gif").convert("RGB"), np.int16)
        for name in (two[0], "zero0")
    )
    assert drawn.shape == alone.shape
    assert np.abs(drawn - alone).mean() < 0.5


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_ranks_to_a_clip(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "unused", max_train_steps=4, checkpointing_steps=1, **DEEP)
    values["validation"]["prompts"] = []
    path, same = write(tmp_path / "recipe.yaml", values), f"+output_dir={tmp_path / 'one'}+resume_from_checkpoint=auto"
    # Two data-parallel ranks, then two ranks that share clips, then the first again: four clips in each step.
    alone, shared = "zero2+train_batch_size=2", f"fsdp{SHARED}+train_batch_size=4"
    run(
        2,
        path,
        tmp_path,
        alone,
        *(f"{kind}+max_train_steps={n}{same}" for n, kind in ((1, alone), (3, shared), (4, alone))),
    )
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / alone), rel=TOLERANCE)
    assert len(losses(tmp_path / "one")) == 4
