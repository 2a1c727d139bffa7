"""Tiny text-to-video models in which nothing is zero, as after training, and pipelines around them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DDPMScheduler, TextToVideoSDPipeline, UNet2DConditionModel, UNet3DConditionModel
from tiny import WIDTH
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizerFast

from mobius_train.convert.components import load_components
from mobius_train.models import ParallelUNet, SerialUNet
from mobius_train.pipeline import TextToVideoPipeline


def unet3d() -> UNet3DConditionModel:
    """ModelScope's layout with fewer levels: heads of one size."""
    torch.manual_seed(4)
    return moved(
        UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=32,
        )
    )


Model = TypeVar("Model", bound=nn.Module)


def moved(model: Model) -> Model:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def serial(folder: Path) -> SerialUNet:
    return moved(SerialUNet.from_unet2d(UNet2DConditionModel.from_pretrained(folder / "unet")))


def parallel(folder: Path) -> ParallelUNet:
    model = ParallelUNet.from_unet2d(UNet2DConditionModel.from_pretrained(folder / "unet"))
    moved(model.ring)
    return model


def save_modelscope(source: Path, folder: Path) -> Path:
    """A pipeline as ModelScope's, with the parts of a Stable Diffusion folder."""
    parts = load_components(source)
    pipeline = TextToVideoSDPipeline(
        vae=parts["vae"],
        text_encoder=CLIPTextModel.from_pretrained(source / "text_encoder"),
        tokenizer=CLIPTokenizerFast.from_pretrained(source / "tokenizer"),
        unet=unet3d(),
        scheduler=DDPMScheduler.from_pretrained(source / "scheduler"),
    )
    pipeline.save_pretrained(folder)
    return folder


def save_final(model: nn.Module, source: Path, folder: Path) -> Path:
    """A run's folder with its final/."""
    pipeline = TextToVideoPipeline(
        unet=model, **load_components(source), num_frames=3, resolution=32, guidance_scale=3.0, max_text_tokens=9
    )
    pipeline.save_pretrained(folder / "final")
    return folder
