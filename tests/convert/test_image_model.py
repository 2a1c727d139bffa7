from __future__ import annotations

import json
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline, StableDiffusionPipeline, UNet2DConditionModel
from recipes import REPOSITORY, recipe
from safetensors.torch import load_file, save_file
from tiny_sd import save_pixart, save_sd3, save_sdxl

from mobius_train.assembly.load_model import load_image_or_video_model
from mobius_train.assembly.parts import load_parts
from mobius_train.assembly.weights import Pretrained
from mobius_train.config import RunConfig
from mobius_train.convert.components import load_components
from mobius_train.convert.image_model import from_image_model
from mobius_train.errors import MobiusError
from mobius_train.models import ParallelUNet, SerialUNet
from mobius_train.models.families import as_denoiser
from mobius_train.pipeline import TextToVideoPipeline, load_pipeline
from mobius_train.pretrained.pipeline_index import named_parts
from mobius_train.ring_shape import PAPER, RingShape


@pytest.mark.parametrize(
    ("kind", "shape", "mode"),
    [
        ("sd15", PAPER, "serial"),
        ("sd15", PAPER, "parallel"),
        ("sd21", RingShape(0.5, 2, tail_temporal_layers=True, trained_tail=True), "parallel"),
    ],
    ids=["sd15-serial", "sd15", "sd21"],
)
def test_every_frame_is_what_the_image_model_draws(
    stable_diffusion: dict[str, Path], kind: str, shape: RingShape, mode: Any, tmp_path: Path
) -> None:
    source = stable_diffusion[kind]
    report = from_image_model(source, tmp_path / "video", mode, num_frames=3, shape=shape)
    assert len(report.checks) == 2
    assert not report.problems
    noise = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0}
    video = load_pipeline(tmp_path / "video", "cpu")
    # With the usual spacing diffusers begins so few steps at a middle timestep.
    video.scheduler = type(video.scheduler).from_config(video.scheduler.config, timestep_spacing="trailing")
    assert isinstance(video.unet, ParallelUNet if mode == "parallel" else SerialUNet)
    clip = video("dog", latents=noise, **options).frames
    stock = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    stock.scheduler = video.scheduler
    for frame in range(3):
        still = stock("dog", latents=noise[:, :, frame], height=32, width=32, **options).images
        # The first step divides by the little signal that is left at the last timestep.
        torch.testing.assert_close(clip[:, :, frame], still, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("save", "part", "mode"),
    [
        (save_sdxl, "unet", "parallel"),
        (save_sdxl, "unet", "serial"),
        (save_sd3, "transformer", "parallel"),
        (save_sd3, "transformer", "serial"),
        (partial(save_pixart, sigma=True), "transformer", "parallel"),
    ],
    ids=["sdxl", "sdxl-serial", "sd3", "sd3-serial", "pixart"],
)
def test_a_pipeline_keeps_its_text_encoders_and_encodes_with_them(
    save: Any, part: str, mode: Any, tmp_path: Path
) -> None:
    source = save(tmp_path / "source")
    report = from_image_model(source, tmp_path / "video", mode, num_frames=2)
    assert len(report.checks) == 2
    assert not report.problems
    assert report.mapped[0][0].startswith(f"{part}, ")
    assert not report.left_out
    with pytest.raises(MobiusError, match="text-to-video model already"):
        from_image_model(tmp_path / "video", tmp_path / "again", mode)
    video = load_pipeline(tmp_path / "video", "cpu")
    text = {name for name in video.components if name.startswith("text_encoder")}
    assert {name for name in text if video.components[name] is not None} == {
        name for name in named_parts(str(source)) if name.startswith("text_encoder")
    }
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0}
    channels = as_denoiser(video.unet).backbone.latent_channels
    noise = torch.randn(1, channels, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    clip = video("a dog", latents=noise, **options).frames
    stock: Any = DiffusionPipeline.from_pretrained(source)
    stock.scheduler = video.scheduler
    if isinstance(stock, PixArtSigmaPipeline):
        # It knows the sizes of the released models alone.
        options["use_resolution_binning"] = False
    for frame in range(2):
        still = stock("a dog", latents=noise[:, :, frame], height=32, width=32, **options).images
        torch.testing.assert_close(clip[:, :, frame], still, rtol=1e-3, atol=1e-3)


def test_the_tool_takes_the_fields_of_a_transformers_ring(
    stable_diffusion: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, name: str, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["convert", "from-image-model", str(source), str(tmp_path / name), *options])
        runpy.run_path(str(REPOSITORY / "tools" / "convert_checkpoint.py"))["main"]()

    source, fields = save_sd3(tmp_path / "source"), ("--ring-every", "1", "--context-latents", "2")
    convert(source, "video", *fields, "--ring-width", "0.5")
    video: Any = load_pipeline(tmp_path / "video", "cpu").unet
    assert video.ring_shape == RingShape(0.5, ring_every=1, context_latents=2)
    with pytest.raises(MobiusError, match=r"ring_every=1, context_latents=2: rings of a UNet"):
        convert(stable_diffusion["sd15"], "unet", *fields)
    with pytest.raises(MobiusError, match=r"serial has no ring: remove ring_every, context_latents"):
        convert(source, "serial", "--mode", "serial", *fields)
    assert not (tmp_path / "unet").exists()


def test_training_starts_from_what_was_written(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    modes: dict[Any, type] = {"parallel": ParallelUNet, "serial": SerialUNet}
    for mode, kind in modes.items():
        from_image_model(stable_diffusion["small"], tmp_path / mode, mode)
        assert isinstance(load_image_or_video_model(None, str(tmp_path / mode)), kind)


def test_weights_that_are_missing_or_left_over_are_refused(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(stable_diffusion["small"], tmp_path / "copy")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    without = {name: tensor for name, tensor in whole.items() if name != "conv_in.bias"}
    for state, complaint in (
        (without, r"conv_in\.bias"),
        (whole | {"extra": torch.ones(1)}, r"\bextra\b"),
    ):
        save_file(state, path)
        with pytest.raises(MobiusError, match=complaint):
            from_image_model(folder, tmp_path / "out", "parallel")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_a_backbone_is_refused(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(stable_diffusion["small"], tmp_path / "copy")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dual_cross_attention": True}))
    with pytest.raises(MobiusError, match=r"unet/config\.json"):
        from_image_model(folder, tmp_path / "out", "parallel")
    with pytest.raises(MobiusError, match=folder.name):
        from_image_model(stable_diffusion["small"], folder, "parallel")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"in_channels": 9}, "takes latents of 9 channels"),
        ({"out_channels": 8}, "predicts 8 channels"),
        ({"cross_attention_dim": [32, 16]}, "for each block"),
        ({"cross_attention_dim": 16}, "width 16"),
    ],
)
def test_a_model_that_does_not_fit_its_pipeline_is_refused_everywhere(
    stable_diffusion: dict[str, Path], tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    folder = shutil.copytree(stable_diffusion["small"], tmp_path / "copy")
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(folder / "unet")
    with pytest.raises(MobiusError, match=complaint):
        from_image_model(folder, tmp_path / "out", "parallel")
    assert not (tmp_path / "out").exists()
    values = recipe(folder, tmp_path, tmp_path / "run", text_encoder_name_or_path=None)
    with pytest.raises(MobiusError, match=complaint):
        load_parts(RunConfig.model_validate(values), Pretrained(), torch.device("cpu"))
    pipeline = TextToVideoPipeline(
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"), **load_components(folder)
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(MobiusError, match=complaint):
        load_pipeline(tmp_path / "pipeline", "cpu")


@pytest.mark.parametrize(("size", "frames"), [(8, (32, 32)), ([8, 12], (32, 48)), (None, None)])
def test_a_model_has_one_size_or_a_height_and_a_width_or_none(
    stable_diffusion: dict[str, Path], tmp_path: Path, size: Any, frames: tuple[int, int] | None
) -> None:
    folder = shutil.copytree(stable_diffusion["small"], tmp_path / "copy")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
    from_image_model(folder, tmp_path / "out", "parallel")
    pipeline = load_pipeline(tmp_path / "out", "cpu")
    options: dict[str, Any] = {"num_frames": 2, "num_inference_steps": 1, "output_type": "uint8"}
    if frames is None:
        with pytest.raises(MobiusError, match="set height and width"):
            pipeline("dog", **options)
        options |= {"height": 32, "width": 48}
    assert pipeline("dog", **options).frames.shape[-2:] == (frames or (32, 48))
