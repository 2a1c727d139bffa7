"""Files that version 0.1.0 wrote still load: see tests/files/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, TextToVideoSDPipeline
from recipes import DS_CONFIGS, REPOSITORY, losses
from safetensors.torch import load_file

from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.config import load
from mobius_train.convert.to_diffusers import checkpoint_to_diffusers
from mobius_train.engine.spread import spread_of
from mobius_train.errors import MobiusError
from mobius_train.job import environment
from mobius_train.models import ParallelUNet, SerialUNet
from mobius_train.pipeline import TextToVideoPipeline, load_pipeline

OLD = Path("tests") / "files" / "written-by-0.1.0"
pytestmark = [pytest.mark.usefixtures("process_group"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes of these files name their models from here."""
    monkeypatch.chdir(REPOSITORY)


def test_the_paths_in_model_index_json_are_a_file_format() -> None:
    """diffusers imports these modules by the names in files that are out there: they cannot move."""
    for mode, kind in (("parallel", ParallelUNet), ("serial", SerialUNet)):
        index = json.loads((OLD / mode / "final" / "model_index.json").read_text())
        assert index["unet"] == [kind.__module__, kind.__name__] == [f"mobius_train.models.{mode}", kind.__name__]
    code = (OLD / "parallel-converted" / "pipeline.py").read_text()
    assert f"from {TextToVideoPipeline.__module__} import TextToVideoPipeline" in code
    assert TextToVideoPipeline.__module__ == "mobius_train.pipeline"


@pytest.mark.parametrize("mode", ["parallel", "serial"])
def test_final_folders_sample(mode: str) -> None:
    clips = load_pipeline(OLD / mode, "cpu")("dog", num_inference_steps=2, output_type="uint8").frames
    assert clips.shape == (1, 4, 3, 32, 32)


def test_converted_folders_sample_what_final_does() -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "return_dict": False,
    }
    latents = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for mode in ("parallel", "serial"):
        folder = str(OLD / f"{mode}-converted")
        extra: dict[str, Any] = {"custom_pipeline": folder, "trust_remote_code": True} if mode == "parallel" else {}
        written = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **extra)
        assert isinstance(written, TextToVideoPipeline if mode == "parallel" else TextToVideoSDPipeline)
        size: dict[str, Any] = {} if mode == "parallel" else {"height": 32, "width": 32}
        expected = load_pipeline(OLD / mode, "cpu")("dog", latents=latents.clone(), **options)[0]
        torch.testing.assert_close(
            written("dog", latents=latents.clone(), **options, **size)[0], expected, rtol=0, atol=1e-3
        )


def test_a_checkpoint_converts_to_the_weights_of_final(tmp_path: Path) -> None:
    checkpoint_to_diffusers(OLD / "parallel" / "checkpoint-2", tmp_path / "converted")
    for part in ("ring", "spatial"):
        name = Path("unet") / part / "diffusion_pytorch_model.safetensors"
        new, old = load_file(tmp_path / "converted" / name), load_file(OLD / "parallel" / "final" / name)
        assert new.keys() == old.keys()
        assert all(torch.equal(new[key], old[key]) for key in old)


def test_a_run_resumes_from_the_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    shutil.copytree(OLD / "parallel" / "checkpoint-2", output / "checkpoint-2")
    overrides = [f"output_dir={output}", "resume_from_checkpoint=checkpoint-2", "max_train_steps=3"]
    config = load(OLD / "parallel" / "config.yaml", overrides)
    from mobius_train.run import train

    spread = spread_of("deepspeed", DS_CONFIGS / "zero2.json", environment.prepare())
    train(config, spread)
    assert len(losses(output)) == 1
    assert open_checkpoint(OLD / "parallel" / "checkpoint-2").state.progress["step"] == 2
    # The control: beside other frozen weights it is refused.
    other = config.model_copy(update={"frozen_dtype": "bf16", "output_dir": output, "max_train_steps": 4})
    with pytest.raises(MobiusError, match="frozen weights"):
        train(other, spread)
