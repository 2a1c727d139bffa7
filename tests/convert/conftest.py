from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from launching import launch
from tiny import save_pipeline
from transformers import CLIPTextModel, CLIPTokenizerFast


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks; see sharded_worker.py."""
    folder = tmp_path_factory.mktemp("sharded")
    result = launch(2, Path(__file__).parent / "sharded_worker.py", str(folder))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny pipeline folders that StableDiffusionPipeline saved, by kind."""
    folders = {}
    for kind in ("sd15", "sd21", "small"):
        folder = save_pipeline(tmp_path_factory.mktemp("models") / kind, kind)
        StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
            tokenizer=CLIPTokenizerFast.from_pretrained(folder / "tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
            scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
        folders[kind] = folder
    return folders
