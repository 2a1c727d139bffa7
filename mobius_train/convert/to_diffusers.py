"""Conversion of a run's result to a folder that diffusers can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from mobius_train.checkpoint.format import CONFIG
from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.config import load
from mobius_train.convert import compare
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.run_checkpoint import EMA, MODEL, weights_of
from mobius_train.convert.stock_pipeline import stock_components
from mobius_train.convert.trained_weights import pipeline_of
from mobius_train.convert.unet3d import to_unet3d
from mobius_train.files import finished_folder
from mobius_train.models import ParallelUNet, SerialUNet, weights_hash
from mobius_train.pipeline import TextToVideoPipeline, load_pipeline

# With trust_remote_code, diffusers loads the pipeline class from this file of the folder.
CUSTOM_PIPELINE = "pipeline.py"
CUSTOM_PIPELINE_CODE = f'''"""DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True).

The package mobius_train must be installed.
"""

from {TextToVideoPipeline.__module__} import TextToVideoPipeline

__all__ = ["TextToVideoPipeline"]
'''
PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")


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

    A parallel model is written as our TextToVideoPipeline, a serial model as diffusers' TextToVideoSDPipeline, and a
    text-to-image model as diffusers' StableDiffusionPipeline.

    Raises:
        MobiusError: diffusers cannot represent the model, or the written pipeline samples other latents.
    """
    report = Report(source, destination)
    pipeline.set_progress_bar_config(disable=True)
    with finished_folder(destination) as folder:
        if isinstance(pipeline.unet, SerialUNet):
            written = _write_serial(pipeline, folder, report)
        elif isinstance(pipeline.unet, UNet2DConditionModel):
            written = _write_image(pipeline, folder, report)
        else:
            written = _write_parallel(pipeline, folder, report)
        written.set_progress_bar_config(disable=True)
        report.mapped.append((f"unet ({type(pipeline.unet).__name__})", f"unet ({type(written.unet).__name__})"))
        report.mapped += [(part, part) for part in PARTS]
        apart = _samples_apart(written, pipeline)
        report.require(
            apart <= compare.SAMPLING_TOLERANCE,
            f"the {type(written).__name__} read back by diffusers samples the same latents as ours (difference"
            f" {apart:.1e})",
        )
        report.raise_problems()
    return report


def _write_parallel(pipeline: TextToVideoPipeline, folder: Path, report: Report) -> Any:
    pipeline.save_pretrained(folder)
    (folder / CUSTOM_PIPELINE).write_text(CUSTOM_PIPELINE_CODE, encoding="utf-8")
    written = DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder), trust_remote_code=True, local_files_only=True
    )
    report.made.append((CUSTOM_PIPELINE, "three lines that import our pipeline class"))
    assert isinstance(pipeline.unet, ParallelUNet)
    for part in pipeline.unet.parts:
        _cast_as_read(getattr(pipeline.unet, part), getattr(written.unet, part))
    expected = weights_hash(pipeline.unet)
    report.require(weights_hash(written.unet) == expected, f"the weights read back have the hash {expected[:12]}…")
    report.notes.append(
        "load it with TextToVideoPipeline.from_pretrained(folder), or with DiffusionPipeline.from_pretrained(folder,"
        " custom_pipeline=folder, trust_remote_code=True); both need mobius_train"
    )
    return written


def _write_serial(pipeline: TextToVideoPipeline, folder: Path, report: Report) -> Any:
    unet3d = to_unet3d(pipeline.unet.unet, pipeline.unet.temporal.state_dict()).to(pipeline.unet.dtype)
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
    StableDiffusionPipeline(
        unet=pipeline.unet,
        **stock_components(pipeline.components, pipeline.config.max_text_tokens, report),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    written = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    _cast_as_read(pipeline.unet, written.unet)
    expected = weights_hash(pipeline.unet)
    report.require(weights_hash(written.unet) == expected, f"the weights read back have the hash {expected[:12]}…")
    _leave_out_settings(pipeline, report)
    report.notes.append("load it with DiffusionPipeline.from_pretrained(folder); mobius_train is not needed")
    return written


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
    still = isinstance(ours.unet, UNet2DConditionModel)
    latents = _noise(ours, 1 if still else compare.FRAMES)
    expected = compare.sampled(ours, latents, guidance_scale=3.0)
    if still:
        size = latents.shape[-1] * written.vae_scale_factor
        images = compare.sampled(written, latents.squeeze(2), guidance_scale=3.0, height=size, width=size)
        return compare.distance(images.unsqueeze(2), expected)
    if isinstance(written, TextToVideoSDPipeline):
        size = latents.shape[-1] * written.vae_scale_factor
        return compare.distance(
            compare.sampled(written, latents, guidance_scale=3.0, height=size, width=size), expected
        )
    return compare.distance(compare.sampled(written, latents, guidance_scale=3.0), expected)


def _noise(pipeline: TextToVideoPipeline, frames: int) -> Tensor:
    size = compare.LATENT_SIZE
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, pipeline.unet.config.in_channels, frames, size, size, generator=generator)
