"""Whole runs of Stable Diffusion XL and 3 and of PixArt, tiny: with all conditions, from the cache and without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from recipes import Run, losses, metrics
from tiny_sd import needs_sd3, needs_sdxl, save_pixart, save_sd3, save_sdxl

from mobius_train.data.cache import LatentCache
from mobius_train.pipeline import load_pipeline
from mobius_train.pretrained.pipeline_index import named_parts

pytestmark = pytest.mark.slow
OWN_TEXT: dict[str, Any] = {"text_encoder_name_or_path": None, "max_text_tokens": None}


@pytest.mark.parametrize(
    ("save", "mode", "names"),
    [
        pytest.param(save_sdxl, "parallel", {"text", "pooled", "sizes"}, marks=needs_sdxl, id="sdxl"),
        pytest.param(save_sdxl, "serial", {"text", "pooled", "sizes"}, marks=needs_sdxl, id="sdxl-serial"),
        pytest.param(save_sd3, "parallel", {"text", "pooled"}, marks=needs_sd3, id="sd3"),
        pytest.param(save_pixart, "parallel", {"text", "mask", "sizes"}, id="pixart"),
    ],
)
def test_a_run_trains_samples_and_exports_with_all_text_encoders(
    run: Run, tmp_path: Path, save: Any, mode: str, names: set[str]
) -> None:
    pipeline = save(tmp_path / "pipeline")
    changes = OWN_TEXT | {"pretrained_model_name_or_path": str(pipeline), "mode": mode, "max_train_steps": 2}
    online = run("online", **changes)
    cached = run("cached", data={"cache_dir": str(tmp_path / "cache")}, **changes)
    assert losses(cached) == losses(online)
    assert all(line["heldout_motion"] > 0 for line in metrics(cached) if "heldout_motion" in line)
    folder = next((tmp_path / "cache").glob("train-*"))
    assert set(LatentCache(folder)[0].conditions.tensors) == names
    text = [part for part in named_parts(str(pipeline)) if part.startswith(("text_encoder", "tokenizer"))]
    assert set(text) <= set(named_parts(str(cached / "final")))
    final = load_pipeline(cached, "cpu")
    final.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    clips = [final(prompt, **options).frames for prompt in ("a dog", "a dog", "a hen")]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])
    # Training goes on from it.
    again = run("again", **(changes | {"pretrained_model_name_or_path": str(cached / "final")}))
    assert len(losses(again)) == 2


@needs_sd3
def test_a_small_transformer_learns_images_with_one_text_encoder(run: Run, tmp_path: Path) -> None:
    pipeline = save_sd3(tmp_path / "pipeline", with_t5=False)
    transformer = json.loads((pipeline / "transformer" / "config.json").read_text())
    # As wide as MiniLM's text, and its mean.
    transformer |= {"joint_attention_dim": 384, "pooled_projection_dim": 384}
    output = run(
        "images",
        stage="text-to-image",
        pretrained_model_name_or_path=None,
        unet_config={name: value for name, value in transformer.items() if name != "_diffusers_version"},
        vae_name_or_path=str(pipeline),
        scheduler_config={"_class_name": FlowMatchEulerDiscreteScheduler.__name__, "shift": 3.0},
        data={"num_frames": 1},
        max_train_steps=2,
    )
    stills = load_pipeline(output, "cpu")
    assert type(stills.unet).__name__ == "SD3Transformer2DModel"
    assert isinstance(stills.scheduler, FlowMatchEulerDiscreteScheduler)
    assert stills.text_encoder_2 is None
    frames = stills("a dog", num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 1, 3, 32, 32)
    changes = {"pretrained_model_name_or_path": str(output / "final"), "max_train_steps": 2}
    assert len(losses(run("clips", **changes))) == 2
