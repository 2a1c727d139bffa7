"""The same run on a GPU, in each precision, under each ZeRO stage and FSDP, with each optimizer, against a CPU's.

Noise, timesteps and clips are drawn on the CPU, so a GPU's losses are those of a CPU but for rounding.
"""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import DS_CONFIGS, OWN_TEXT, losses, recipe, write
from recipes import start as start_with

# Relative, of a float32 run on a CPU. Under bf16 a CPU's losses differ from it by up to 0.0015; GPUs round float32
# convolutions to TF32, which has the mantissa of fp16. A run that learns nothing differs by 0.03 in its second step.
TOLERANCE = {"no": 2e-3, "fp16": 5e-3, "bf16": 1e-2}
# From 2^16 the first steps would be those that the loss scaler skips.
SCALE_POWER = 8


def check_losses(found: list[float], reference: list[float], precision: str) -> None:
    assert all(map(math.isfinite, found)), found
    assert found == pytest.approx(reference, rel=TOLERANCE[precision])


def start(path: Path, *arguments: str, ds_config: str | None = "zero2") -> subprocess.CompletedProcess[str]:
    """Without a launcher, which would take another import of DeepSpeed."""
    return start_with(path, *arguments, ds_config=ds_config, launcher="python")


def on_gpu(test: Any) -> Any:
    skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skipped(test))


@pytest.fixture(scope="module")
def cpu_losses(small_pipeline: Path, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the recipe in float32 on this machine's CPU."""
    folder = tmp_path_factory.mktemp("cpu")
    path = write(folder / "recipe.yaml", recipe(small_pipeline, clips_folder, folder / "out", **OWN_TEXT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        result = start(path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(losses(folder / "out")) == 4
    return losses(folder / "out")


def _ds_config(name: str | None, folder: Path) -> str | None:
    """The path, without .json, of a shipped file with SCALE_POWER; None is FSDP."""
    if name is None:
        return None
    values = json.loads((DS_CONFIGS / f"{name}.json").read_text())
    values["fp16"] = values.get("fp16", {}) | {"initial_scale_power": SCALE_POWER}
    (folder / f"{name}.json").write_text(json.dumps(values))
    return str(folder / name)


def _fsdp(name: str | None, **settings: Any) -> dict[str, Any]:
    return {} if name is not None else {"fsdp": {"initial_scale_power": SCALE_POWER, **settings}}


@on_gpu
@pytest.mark.parametrize("ds_config", ["zero0", "zero2", "zero3", None])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_a_run_on_a_gpu(
    small_pipeline: Path,
    clips_folder: Path,
    tmp_path: Path,
    cpu_losses: list[float],
    mixed_precision: str,
    ds_config: str | None,
) -> None:
    changes = {"mixed_precision": mixed_precision, "use_ema": True} | _fsdp(ds_config)
    values = recipe(small_pipeline, clips_folder, tmp_path / "out", **changes, **OWN_TEXT)
    result = start(write(tmp_path / "recipe.yaml", values), ds_config=_ds_config(ds_config, tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    check_losses(losses(tmp_path / "out"), cpu_losses, mixed_precision)
    assert (tmp_path / "out" / "final" / "model_index.json").exists()


@on_gpu
@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_fsdp_with_its_states_in_host_memory(
    small_pipeline: Path, clips_folder: Path, tmp_path: Path, cpu_losses: list[float], mixed_precision: str
) -> None:
    changes = {"mixed_precision": mixed_precision} | _fsdp(None, cpu_offload=True)
    values = recipe(small_pipeline, clips_folder, tmp_path / "out", **changes, **OWN_TEXT)
    result = start(write(tmp_path / "recipe.yaml", values), ds_config=None)
    assert result.returncode == 0, result.stderr[-3000:]
    check_losses(losses(tmp_path / "out"), cpu_losses, mixed_precision)


@on_gpu
@pytest.mark.parametrize("ds_config", ["zero0", "zero2", "zero3", None])
def test_8_bit_moments_and_a_resume_from_them(
    small_pipeline: Path, clips_folder: Path, tmp_path: Path, cpu_losses: list[float], ds_config: str | None
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    changes = {"mixed_precision": "bf16", "checkpointing_steps": 2} | OWN_TEXT
    values = recipe(small_pipeline, clips_folder, tmp_path / "exact", **changes)
    path = write(tmp_path / "recipe.yaml", values)
    result = start(path, ds_config=ds_config)
    assert result.returncode == 0, result.stderr[-3000:]
    check_losses(losses(tmp_path / "exact"), cpu_losses, "bf16")
    eight = (f"output_dir={tmp_path / 'eight'}", "optimizer=adamw_8bit")
    for resumed in ((), ("resume_from_checkpoint=checkpoint-2",)):
        result = start(path, *eight, *resumed, ds_config=ds_config)
        assert result.returncode == 0, result.stderr[-3000:]
        assert losses(tmp_path / "eight") == pytest.approx(losses(tmp_path / "exact"), rel=0.05)


# Four steps of the recipe on a CPU: ZeRO 2 without mixed precision, FSDP under bf16, ZeRO 2 at a learning rate of 1e-9.
FLOAT32 = [0.5832662582397461, 0.4937124252319336, 0.44733208417892456, 0.1940203756093979]
BF16 = [0.5830727815628052, 0.49375835061073303, 0.4468788206577301, 0.19390609860420227]
UNTRAINED = [0.5832662582397461, 0.5119969248771667, 0.4790586233139038, 0.23940379917621613]


def test_a_cpus_losses_under_bf16_pass() -> None:
    check_losses(BF16, FLOAT32, "bf16")


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    "found",
    [[*FLOAT32[:3], math.nan], [math.inf, *FLOAT32[1:]], [math.nan] * 4, FLOAT32[:3], UNTRAINED],
    ids=["nan", "inf", "all nan", "three steps", "untrained"],
)
def test_the_control_other_losses_are_refused(found: list[float], precision: str) -> None:
    with pytest.raises(AssertionError):
        check_losses(found, FLOAT32, precision)


@pytest.mark.parametrize(("precision", "tolerance"), TOLERANCE.items())
def test_the_control_the_tolerance_is_kept(precision: str, tolerance: float) -> None:
    check_losses([FLOAT32[0] * (1 + 0.9 * tolerance), *FLOAT32[1:]], FLOAT32, precision)
    with pytest.raises(AssertionError):
        check_losses([FLOAT32[0] * (1 + 1.1 * tolerance), *FLOAT32[1:]], FLOAT32, precision)
