"""The same run on a GPU, in each precision and under each ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes import losses, recipe, start, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("ds_config", ["zero0", "zero2", "zero3"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_a_run_on_a_gpu(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path, mixed_precision: str, ds_config: str
) -> None:
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "out", mixed_precision=mixed_precision, use_ema=True)
    result = start(write(tmp_path / "recipe.yaml", values), ds_config=ds_config)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(losses(tmp_path / "out")) == 4
    assert (tmp_path / "out" / "final" / "model_index.json").exists()
