"""Frozen models sharded over two and three ranks: nothing that they compute changes, and whole ones are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import launch
from recipes import DEEP, DS_CONFIGS, losses, metrics, recipe, start, write
from tiny_sd import save_sd3

PLAIN, SHARDED = "zero2", "zero2+shard_frozen=true"
FSDP = "fsdp+shard_frozen=true"

pytestmark = pytest.mark.distributed


def _heldout(output: Path) -> list[float]:
    return [line["heldout_loss"] for line in metrics(output) if "heldout_loss" in line]


def _files(folder: Path) -> dict[str, bytes]:
    """Without MP4, which is not written the same twice, the pictures that have a row more without sharding, and the
    model card, which has them and the recipe."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".mp4")
    files = (
        path for path in files if path.name not in ("comparison.gif", "contact_sheet.png", "README.md", "samples.gif")
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("save", "ranks", "clips", "cached", "fsdp", "changes"),
    [
        # Three ranks hold parts of different sizes.
        (None, 3, 2, True, False, {}),
        # With three text encoders.
        (save_sd3, 2, 3, False, True, {"text_encoder_name_or_path": None, "max_text_tokens": None}),
    ],
    ids=["cached-3-ranks", "sd3-2-ranks"],
)
def test_sharded_frozen_models_compute_the_same_to_the_last_bit(
    tiny_pipeline: Path,
    clips_folder: Path,
    tmp_path: Path,
    save: Any,
    ranks: int,
    clips: int,
    cached: bool,
    fsdp: bool,
    changes: Any,
) -> None:
    pipeline = tiny_pipeline if save is None else save(tmp_path / "pipeline")
    values = recipe(pipeline, clips_folder, tmp_path / "unused", max_train_steps=2, **DEEP, **changes)
    # The ranks have not equally much to do.
    values["validation"]["max_clips"] = clips
    if cached:
        values["data"]["cache_dir"] = str(tmp_path / "cache")
    path = write(tmp_path / "recipe.yaml", values)
    worker = Path(__file__).parents[1] / "runs" / "ranks_worker.py"
    runs = (PLAIN, SHARDED, FSDP) if fsdp else (PLAIN, SHARDED)
    result = launch(ranks, worker, str(path), str(tmp_path), str(DS_CONFIGS), *runs)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]

    plain, sharded = tmp_path / PLAIN, tmp_path / SHARDED
    assert losses(sharded) == losses(plain)
    # The batches are filled up, and kernels choose by their size.
    assert _heldout(sharded) == pytest.approx(_heldout(plain), rel=1e-6)
    for folder in ("samples", "final"):
        assert _files(sharded / folder) == _files(plain / folder) != {}
    if fsdp:
        assert losses(tmp_path / FSDP) == pytest.approx(losses(plain), rel=1e-5)
        spatial = "final/unet/spatial/diffusion_pytorch_model.safetensors"
        assert (tmp_path / FSDP / spatial).read_bytes() == (plain / spatial).read_bytes()


def test_one_rank_has_nothing_to_shard_over(tiny_pipeline: Path, clips_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out", shard_frozen=True))
    result = start(path, launcher="ranks")
    assert result.returncode == 1
    assert "shard_frozen=true" in result.stderr
    assert not (tmp_path / "out").exists()
