"""One, two and four ranks under ZeRO 0 to 3 and FSDP: the same global batch gives the same losses.

The clips, noise and timesteps of a global batch are the same bits on any number of ranks. What differs is the order
in which float32 sums are made: kernels choose by the size of the batch, and gradients are added up over ranks. After
three steps of AdamW that is some 1e-6 of the loss; a wrong sample or a wrong mean is 1e-2 and more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch
from recipes import DEEP, DS_CONFIGS, losses, metrics, recipe, start, write

ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp")
# Layers that are recomputed while FSDP gathers them for the backward pass; and two groups of two ranks.
RECOMPUTED = "fsdp+gradient_checkpointing=true"
HYBRID = "fsdp+fsdp.sharding=hybrid+fsdp.shard_size=2"
TOLERANCE = 1e-5


def _engines(ranks: int) -> tuple[str, ...]:
    return {1: ("zero0", "zero3"), 2: (*ENGINES, RECOMPUTED), 4: ("zero2", HYBRID)}[ranks]


def _launch(ranks: int, recipe_path: Path, output: Path) -> None:
    worker = Path(__file__).parent / "ranks_worker.py"
    result = launch(ranks, worker, str(recipe_path), str(output), str(DS_CONFIGS), *_engines(ranks), timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.mark.distributed
def test_one_two_and_four_ranks_under_every_engine_lose_the_same(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "unused", max_train_steps=3, use_ema=True, **DEEP)
    values["validation"]["prompts"] = []
    path = write(tmp_path / "recipe.yaml", values)
    for ranks in (1, 2, 4):
        _launch(ranks, path, tmp_path / str(ranks))
    reference = losses(tmp_path / "1" / "zero0")
    assert len(reference) == 3
    assert len(set(reference)) == 3
    for ranks in (1, 2, 4):
        for engine in _engines(ranks):
            output = tmp_path / str(ranks) / engine
            assert losses(output) == pytest.approx(reference, rel=TOLERANCE), (ranks, engine)
            heldout = [line["heldout_loss"] for line in metrics(output) if "heldout_loss" in line]
            first = [line["heldout_loss"] for line in metrics(tmp_path / "1" / "zero0") if "heldout_loss" in line]
            assert heldout == pytest.approx(first, rel=TOLERANCE), (ranks, engine)


@pytest.mark.distributed
def test_the_control_another_global_batch_loses_something_else(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "out", max_train_steps=3, train_batch_size=1)
    values["validation"]["prompts"] = []
    path = write(tmp_path / "recipe.yaml", values)
    assert start(path).returncode == 0
    assert start(path, f"output_dir={tmp_path / 'larger'}", "train_batch_size=4", launcher="ranks").returncode == 0
    assert losses(tmp_path / "out") != pytest.approx(losses(tmp_path / "larger"), rel=1e-2)


@pytest.mark.distributed
def test_a_mistake_exits_non_zero_through_every_launcher(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out"))
    for launcher, ranks in (("deepspeed", 1), ("torchrun", 2), ("python", 1)):
        result = start(path, "learning_rat=1", launcher=launcher, ranks=ranks)
        assert result.returncode != 0, launcher
        assert "did you mean learning_rate" in result.stdout + result.stderr, launcher
    assert not (tmp_path / "out").exists()
