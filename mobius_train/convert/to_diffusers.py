"""Conversion of a run's result to a folder that diffusers can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TextToVideoSDPipeline,
)
from torch import Tensor

from mobius_train.checkpoint.format import CONFIG, EMA, MODEL
from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.conditions import MASK, POOLED
from mobius_train.config import load
from mobius_train.convert import compare
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.run_checkpoint import weights_of
from mobius_train.convert.stock_pipeline import check_ddpm, stock_components
from mobius_train.convert.trained_weights import pipeline_of
from mobius_train.convert.unet3d import to_unet3d
from mobius_train.encoders.clip_towers import T5_TOKENS
from mobius_train.files import finished_folder
from mobius_train.models import SerialUNet, weights_hash
from mobius_train.models.composite import Composite
from mobius_train.models.families import as_denoiser, is_video_model
from mobius_train.pipeline import TextToVideoPipeline, load_pipeline

# With trust_remote_code, diffusers loads the pipeline class from this file of the folder.
CUSTOM_PIPELINE = "pipeline.py"
CUSTOM_PIPELINE_CODE = f'''"""DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True).

The package mobius_train must be installed.
"""

from {TextToVideoPipeline.__module__} import TextToVideoPipeline

__all__ = ["TextToVideoPipeline"]
'''


def to_diffusers(source: Path, destination: Path) -> Report:
    """Write the pipeline of a run as a folder for diffusers; the report names its class.

    Args:
        source: a run's output_dir, its final/, or any folder of our pipeline.

    Raises:
        MobiusError: see `write_pipeline`; or the source is not a pipeline.
    """
    return write_pipeline(load_pipeline(source, "cpu"), source, destination)


def checkpoint_to_diffusers(
    source: Path, destination: Path, weights: str | None = None, config: Path | None = None
) -> Report:
    """Write a run's checkpoint as a pipeline for diffusers, equal to the final/ of a run that ended there.

    Args:
        weights: "model" or "ema"; None: the average if the run has one, as in final/.
        config: a recipe that replaces the checkpoint's, for models that have moved.

    Raises:
        MobiusError: see `write_pipeline`; or the checkpoint is damaged, or the frozen weights have changed.
    """
    checkpoint = open_checkpoint(source)
    entry = weights or (EMA if checkpoint.state.contents.use_ema else MODEL)
    trained = weights_of(checkpoint, entry)
    pipeline = pipeline_of(load(config or source / CONFIG), trained, checkpoint.state.frozen_sha256)
    report = write_pipeline(pipeline, source, destination)
    report.notes.append(f"{entry} weights of step {checkpoint.state.progress['step']}")
    return report


def write_pipeline(pipeline: TextToVideoPipeline, source: Path, destination: Path) -> Report:
    """Write our pipeline for diffusers, read it back, and compare the sampled latents.

    A serial model of Stable Diffusion 1 or 2 is written as diffusers' TextToVideoSDPipeline. A text-to-image model is
    written as diffusers' StableDiffusionPipeline, StableDiffusionXLPipeline or StableDiffusion3Pipeline. All others are
    written as our TextToVideoPipeline, among them PixArt, and models of XL and 3 with another number of text encoders.

    Raises:
        MobiusError: diffusers cannot represent the model, or the written pipeline samples other latents.
    """
    report = Report(source, destination)
    pipeline.set_progress_bar_config(disable=True)
    several, model = pipeline.text_encoder_2 is not None, pipeline.unet
    wanted = as_denoiser(model).backbone.condition_widths
    pools, masks = POOLED in wanted, MASK in wanted
    with finished_folder(destination) as folder:
        if isinstance(model, SerialUNet) and not several and not pools:
            written = _write_serial(pipeline, folder, report)
        elif not is_video_model(model) and several == pools and not masks:
            written = _write_image(pipeline, folder, report)
        else:
            written = _write_ours(pipeline, folder, report)
        written.set_progress_bar_config(disable=True)
        report.mapped.append((f"unet ({type(model).__name__})", f"{_part(written)} ({type(_model(written)).__name__})"))
        report.mapped += [(part, part) for part, value in sorted(pipeline.components.items()) if _kept(part, value)]
        apart = _samples_apart(written, pipeline)
        report.require(
            apart <= compare.SAMPLING_TOLERANCE,
            f"the {type(written).__name__} read back by diffusers samples the same latents as ours (difference"
            f" {apart:.1e})",
        )
        report.raise_problems()
    return report


def _kept(part: str, value: object) -> bool:
    return part != "unet" and value is not None


def _part(written: Any) -> str:
    return "transformer" if isinstance(written, StableDiffusion3Pipeline) else "unet"


def _model(written: Any) -> Any:
    return getattr(written, _part(written))


def _write_ours(pipeline: TextToVideoPipeline, folder: Path, report: Report) -> Any:
    pipeline.save_pretrained(folder)
    (folder / CUSTOM_PIPELINE).write_text(CUSTOM_PIPELINE_CODE, encoding="utf-8")
    written = DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder), trust_remote_code=True, local_files_only=True
    )
    report.made.append((CUSTOM_PIPELINE, "three lines that import our pipeline class"))
    model = pipeline.unet
    if isinstance(model, Composite):
        for part in model.parts:
            _cast_as_read(getattr(model, part), getattr(written.unet, part))
    else:
        _cast_as_read(model, written.unet)
    expected = weights_hash(model)
    report.require(weights_hash(written.unet) == expected, f"the weights read back have the hash {expected[:12]}…")
    report.notes.append(
        "load it with TextToVideoPipeline.from_pretrained(folder), or with DiffusionPipeline.from_pretrained(folder,"
        " custom_pipeline=folder, trust_remote_code=True); both need mobius_train"
    )
    return written


def _write_serial(pipeline: TextToVideoPipeline, folder: Path, report: Report) -> Any:
    unet3d = to_unet3d(pipeline.unet.unet, pipeline.unet.temporal.state_dict()).to(pipeline.unet.dtype)
    check_ddpm(pipeline.components, TextToVideoSDPipeline)
    stock = stock_components(pipeline.components, pipeline.config.max_text_tokens, report)
    TextToVideoSDPipeline(unet=unet3d, **stock).save_pretrained(folder)
    written = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    _cast_as_read(unet3d, written.unet)
    _cast_as_read(pipeline.unet, written.unet)
    expected = weights_hash(unet3d)
    report.require(weights_hash(written.unet) == expected, f"the weights read back have the hash {expected[:12]}…")
    apart = compare.distance(compare.prediction(written.unet), compare.prediction(pipeline.unet))
    report.require(
        apart <= compare.TOLERANCE, f"UNet3DConditionModel predicts the same as ours (difference {apart:.1e})"
    )
    _leave_out_settings(pipeline, report)
    report.notes.append("load it with DiffusionPipeline.from_pretrained(folder); mobius_train is not needed")
    return written


def _write_image(pipeline: TextToVideoPipeline, folder: Path, report: Report) -> Any:
    wanted = as_denoiser(pipeline.unet).backbone.condition_widths
    stock = stock_components(pipeline.components, pipeline.config.max_text_tokens, report, wanted)
    made = _stock_image_pipeline(pipeline, stock)
    made.save_pretrained(folder)
    # diffusers loads a pipeline without a part only if the part is passed as None.
    missing = [name for name in ("text_encoder_3", "tokenizer_3") if getattr(made, name, stock) is None]
    written = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, **dict.fromkeys(missing))
    _cast_as_read(pipeline.unet, _model(written))
    expected = weights_hash(pipeline.unet)
    report.require(weights_hash(_model(written)) == expected, f"the weights read back have the hash {expected[:12]}…")
    _leave_out_settings(pipeline, report)
    arguments = ", ".join(["folder", *(f"{name}=None" for name in missing)])
    report.notes.append(f"load it with DiffusionPipeline.from_pretrained({arguments}); mobius_train is not needed")
    return written


def _stock_image_pipeline(pipeline: TextToVideoPipeline, stock: dict[str, Any]) -> DiffusionPipeline:
    """diffusers' pipeline for the image model."""
    model = pipeline.unet
    if isinstance(model, SD3Transformer2DModel):
        without_t5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
        return StableDiffusion3Pipeline(transformer=model, **(without_t5 | stock))
    if pipeline.text_encoder_2 is not None:
        check_ddpm(stock, StableDiffusionXLPipeline)
        return StableDiffusionXLPipeline(unet=model, **stock, add_watermarker=False)
    check_ddpm(stock, StableDiffusionPipeline)
    return StableDiffusionPipeline(
        unet=model, **stock, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _cast_as_read(ours: Any, written: Any) -> None:
    """Cast our model as diffusers reads it: 16-bit files become float32, which changes no value."""
    ours.to(written.dtype)


def _leave_out_settings(pipeline: TextToVideoPipeline, report: Report) -> None:
    names = ("num_frames", "resolution", "guidance_scale", "frame_noise_correlation")
    report.left_out += [
        (f"{name}={pipeline.config[name]}", "diffusers' pipeline has no such setting: pass it in the call")
        for name in names
    ]


def _samples_apart(written: Any, ours: TextToVideoPipeline) -> float:
    """The difference of the latents that both pipelines sample from the same noise and prompt."""
    still = not is_video_model(ours.unet)
    latents = _noise(ours, 1 if still else compare.FRAMES)
    expected = compare.sampled(ours, latents, guidance_scale=3.0)
    options: dict[str, Any] = {"guidance_scale": 3.0}
    if not isinstance(written, TextToVideoPipeline):
        options["height"] = options["width"] = latents.shape[-1] * written.vae_scale_factor
    if isinstance(written, StableDiffusion3Pipeline):
        options["max_sequence_length"] = ours.config.max_text_tokens or T5_TOKENS
    if isinstance(written, (TextToVideoPipeline, TextToVideoSDPipeline)):
        return compare.distance(compare.sampled(written, latents, **options), expected)
    images = compare.sampled(written, latents.squeeze(2), **options)
    return compare.distance(images.unsqueeze(2), expected)


def _noise(pipeline: TextToVideoPipeline, frames: int) -> Tensor:
    size = compare.LATENT_SIZE
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, pipeline.unet.config.in_channels, frames, size, size, generator=generator)
