"""The same run on a GPU, in each precision, under each ZeRO stage and FSDP, with each optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes import losses, recipe, start, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("ds_config", ["zero0", "zero2", "zero3", None])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_a_run_on_a_gpu(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path, mixed_precision: str, ds_config: str | None
) -> None:
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "out", mixed_precision=mixed_precision, use_ema=True)
    result = start(write(tmp_path / "recipe.yaml", values), ds_config=ds_config)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(losses(tmp_path / "out")) == 4
    assert (tmp_path / "out" / "final" / "model_index.json").exists()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_fsdp_with_its_states_in_host_memory(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path, mixed_precision: str
) -> None:
    offload = {"cpu_offload": True}
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "out", mixed_precision=mixed_precision, fsdp=offload)
    result = start(write(tmp_path / "recipe.yaml", values), ds_config=None)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(losses(tmp_path / "out")) == 4


@pytest.mark.parametrize("ds_config", ["zero0", "zero2", "zero3", None])
def test_8_bit_moments_and_a_resume_from_them(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path, ds_config: str | None
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "exact", mixed_precision="bf16", checkpointing_steps=2)
    path = write(tmp_path / "recipe.yaml", values)
    assert start(path, ds_config=ds_config).returncode == 0
    eight = (f"output_dir={tmp_path / 'eight'}", "optimizer=adamw_8bit")
    result = start(path, *eight, ds_config=ds_config)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / "eight") == pytest.approx(losses(tmp_path / "exact"), rel=0.05)
    result = start(path, *eight, "resume_from_checkpoint=checkpoint-2", ds_config=ds_config)
    assert result.returncode == 0, result.stderr[-3000:]
