"""From a checkpoint of a run to what its final/ holds: consolidated, and as a pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from consolidation_memory import peak_over_output
from diffusers import UNet2DConditionModel
from launching import convert
from made_checkpoints import make
from recipes import Run
from safetensors.torch import load_file

from mobius_train.config import load
from mobius_train.convert.consolidate import consolidate_checkpoint
from mobius_train.convert.to_diffusers import checkpoint_to_diffusers, to_diffusers, write_pipeline
from mobius_train.convert.trained_weights import open_safetensors, pipeline_of
from mobius_train.errors import MobiusError

# The samples and the held-out loss of a run are no part of its checkpoints.
QUIET: dict[str, Any] = {"validation": {"prompts": []}, "data": {"validation": None}}
RING = Path("unet", "ring", "diffusion_pytorch_model.safetensors")


def _same(one: Path, other: Path) -> bool:
    expected = load_file(other)
    found = load_file(one)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["parallel", "serial"])
def test_a_run_in_16_bits_is_converted(run: Run, tmp_path: Path, mode: str) -> None:
    output = run(
        mode=mode,
        mixed_precision="bf16",
        ds_config=None,
        checkpointing_steps=1,
        max_train_steps=1,
        **QUIET,
    )
    consolidate_checkpoint(output / "checkpoint-1", tmp_path / "whole.safetensors")
    config = load(output / "config.yaml")
    trained = open_safetensors(tmp_path / "whole.safetensors")
    checkpoint_to_diffusers(output / "checkpoint-1", tmp_path / "checkpoint")
    write_pipeline(pipeline_of(config, trained), tmp_path / "whole.safetensors", tmp_path / "consolidated")
    to_diffusers(output, tmp_path / "final")
    # All three are the same model, which the conversion itself compares with the run's.
    states = [
        {
            f"{path.parent.name} {name}": tensor.float()
            for path in (tmp_path / folder / "unet").rglob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        for folder in ("checkpoint", "consolidated", "final")
    ]
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())


@pytest.mark.slow
def test_a_frozen_branch_in_another_dtype_is_that_of_the_run(run: Run, tmp_path: Path) -> None:
    output = run(frozen_dtype="bf16", checkpointing_steps=1, max_train_steps=1, **QUIET)
    checkpoint_to_diffusers(output / "checkpoint-1", tmp_path / "converted")
    for part in ("ring", "spatial"):
        name = Path("unet") / part / "diffusion_pytorch_model.safetensors"
        assert _same(tmp_path / "converted" / name, output / "final" / name)
    dtypes = {
        part: next(iter(load_file(output / "final" / "unet" / part / RING.name).values())).dtype
        for part in ("ring", "spatial")
    }
    assert dtypes == {"ring": torch.float32, "spatial": torch.bfloat16}
    # The control: beside a branch in float32 the trained weights are refused.
    recipe = tmp_path / "other.yaml"
    recipe.write_text((output / "config.yaml").read_text().replace("frozen_dtype: bf16", "frozen_dtype: fp32"))
    with pytest.raises(MobiusError, match="frozen weights"):
        checkpoint_to_diffusers(output / "checkpoint-1", tmp_path / "refused", config=recipe)


@pytest.mark.distributed
def test_the_last_checkpoint_becomes_what_final_holds(run: Run, tmp_path: Path) -> None:
    output = run(use_ema=True, checkpointing_steps=1, max_train_steps=2, **QUIET, ds_config="zero1")
    final = output / "final" / RING
    # Consolidated. The run's folder means its latest checkpoint.
    for source, tag, name in ((output, None, "a"), (output / "checkpoint-2", None, "b"), (output, "checkpoint-1", "c")):
        consolidate_checkpoint(source, tmp_path / f"{name}.safetensors", weights="ema", tag=tag)
    consolidate_checkpoint(output, tmp_path / "raw.safetensors")
    assert _same(tmp_path / "a.safetensors", final)
    assert _same(tmp_path / "b.safetensors", final)
    assert not _same(tmp_path / "c.safetensors", final)
    assert not _same(tmp_path / "raw.safetensors", final)
    with pytest.raises(MobiusError, match=r"model and ema"):
        consolidate_checkpoint(output, tmp_path / "d.safetensors", weights="emma")
    # As a pipeline.
    report = checkpoint_to_diffusers(output / "checkpoint-2", tmp_path / "last")
    assert "ema weights of step 2" in report.notes
    assert _same(tmp_path / "last" / RING, final)
    for name, weights in (("checkpoint-1", None), ("checkpoint-2", "model")):
        checkpoint_to_diffusers(output / name, tmp_path / name, weights)
        assert not _same(tmp_path / name / RING, final)
    done = convert("to-diffusers", output / "checkpoint-2", tmp_path / "typed", "--weights", "ema")
    assert done.returncode == 0, done.stderr
    assert _same(tmp_path / "typed" / RING, final)


@pytest.mark.slow
def test_other_frozen_weights_and_damages_are_refused(run: Run, tiny_pipeline: Path, tmp_path: Path) -> None:
    backbone = shutil.copytree(tiny_pipeline, tmp_path / "backbone")
    output = run(
        pretrained_model_name_or_path=str(backbone),
        checkpointing_steps=1,
        max_train_steps=1,
        **QUIET,
    )
    unet = UNet2DConditionModel.from_pretrained(backbone / "unet")
    torch.nn.init.zeros_(unet.conv_in.bias)
    unet.save_pretrained(backbone / "unet")
    with pytest.raises(MobiusError, match=r"frozen weights.*pretrained_model_name_or_path"):
        checkpoint_to_diffusers(output / "checkpoint-1", tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    shard = output / "checkpoint-1" / "rank-00000-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    for attempt in (
        lambda: consolidate_checkpoint(output, tmp_path / "a.safetensors"),
        lambda: checkpoint_to_diffusers(output / "checkpoint-1", tmp_path / "pipeline"),
    ):
        with pytest.raises(MobiusError, match=shard.name):
            attempt()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 4])
def test_consolidating_peaks_at_no_more_than_twice_the_weights(tmp_path: Path, ranks: int) -> None:
    # 48 tensors of 4 MB, and as much again of each moment and the average, which stay on the disk.
    folder = make(tmp_path, 4, ranks, {f"ring.{number}": [1024, 1024] for number in range(48)})
    ratio = peak_over_output(folder, tmp_path / "whole.safetensors")
    print(f"{ranks} rank(s): peak {ratio:.2f} times the float32 weights")
    assert ratio <= 2
