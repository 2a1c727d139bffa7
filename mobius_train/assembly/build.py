"""From a configuration to a task: load, check that the parts fit, and only then build.

Everything that can be wrong in the input is found here, before anything slow starts.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from mobius_train.assembly.fetch import describe_data
from mobius_train.assembly.load import load_part, load_unet
from mobius_train.assembly.open_data import open_data
from mobius_train.assembly.options import (
    DTYPES,
    apply_attention_backend,
    apply_memory_options,
    check_device,
    frozen_dtype,
)
from mobius_train.config import RunConfig
from mobius_train.data.clips import ClipDataset
from mobius_train.diffusion.objective import DiffusionObjective
from mobius_train.encoders.encoders import Encoders
from mobius_train.encoders.image_encoder import ImageEncoder
from mobius_train.encoders.text_encoder import TextEncoder, load_text_encoder
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.models import Denoiser, build_denoiser
from mobius_train.models.choose_attention import Machine
from mobius_train.tasks.autoencoder import AutoencoderTask
from mobius_train.tasks.denoising import DiffusionTask
from mobius_train.tasks.task import Task


def build_task(config: RunConfig, distributed: Distributed) -> Task:
    """The task of `config.stage`, with its models on this rank's device and its data open.

    Raises:
        MobiusError: a model or data folder is missing, or the parts do not fit each other.
    """
    check_device(config, distributed.device)
    # The same new weights on every rank.
    torch.manual_seed(config.seed)
    dtype = DTYPES[config.mixed_precision]
    # That they are there at all; reading, and fetching, comes when the recipe's models are known to fit.
    describe_data(config.data)
    if config.stage == "autoencoder":
        vae = load_part(AutoencoderKL, "vae", config.vae_config, config.pretrained_model_name_or_path)
        _check_resolution(config, vae)
        train, heldout = open_data(config, distributed)
        return AutoencoderTask(config, vae, train, heldout, distributed, dtype)

    unet = load_unet(config.unet_config, config.pretrained_model_name_or_path)
    scheduler = load_part(DDPMScheduler, "scheduler", config.scheduler_config, config.pretrained_model_name_or_path)
    objective = DiffusionObjective(scheduler, config.objective)
    vae = load_part(AutoencoderKL, "vae", None, config.vae_name_or_path or config.pretrained_model_name_or_path)
    _check_resolution(config, vae)
    text_source = config.text_encoder_name_or_path or config.pretrained_model_name_or_path
    if text_source is None:
        raise MobiusError("no text encoder: set text_encoder_name_or_path")
    text = load_text_encoder(text_source, distributed.device, config.max_text_tokens)
    _check_fit(unet, vae, text.width, text_source)
    train, heldout = open_data(config, distributed)
    return diffusion_task(config, unet, objective, vae, text, train, heldout, distributed)


def diffusion_task(
    config: RunConfig,
    unet: Any,
    objective: DiffusionObjective,
    vae: AutoencoderKL,
    text: TextEncoder,
    train: ClipDataset,
    heldout: ClipDataset | None,
    distributed: Distributed,
) -> DiffusionTask:
    """A denoiser around the UNet and its frozen encoders, on this rank's device, as the recipe wants them."""
    dtype = DTYPES[config.mixed_precision]
    denoiser = denoiser_of(config, unet)
    for line in apply_attention_backend(denoiser, config, Machine.of(distributed.device)):
        if distributed.is_main:
            print(line, flush=True)
    # float32 masters are the engine's; a frozen branch needs none.
    if denoiser.frozen is not None:
        denoiser.frozen.to(distributed.device, frozen_dtype(config))
    encoders = Encoders(ImageEncoder(vae, distributed.device), text)
    return DiffusionTask(config, denoiser, objective, encoders, train, heldout, distributed, dtype)


def denoiser_of(config: RunConfig, unet: Any) -> Denoiser:
    """The model that the recipe trains, around a UNet; also what the memory planner builds.

    Raises:
        MobiusError: see `build_denoiser`.
    """
    assert config.stage != "autoencoder"
    denoiser = build_denoiser(unet, config.stage, config.mode, config.gradient_checkpointing)
    apply_memory_options(denoiser, config)
    return denoiser


def _check_resolution(config: RunConfig, vae: AutoencoderKL) -> None:
    reduction = 2 ** (len(vae.config.block_out_channels) - 1)
    sides = {"data.resolution": config.data.resolution}
    for number, bucket in enumerate(config.data.buckets or ()):
        sides |= {f"data.buckets.{number}.width": bucket.width, f"data.buckets.{number}.height": bucket.height}
    for name, pixels in sides.items():
        if pixels % reduction:
            raise MobiusError(f"{name}={pixels} is no multiple of {reduction}, the autoencoder's reduction")


def _check_fit(unet: Any, vae: AutoencoderKL, text_width: int, text_source: str) -> None:
    if unet.config.in_channels != vae.config.latent_channels:
        raise MobiusError(
            f"the UNet takes {unet.config.in_channels} channels but the autoencoder gives"
            f" {vae.config.latent_channels}: these two do not belong together"
        )
    if unet.config.cross_attention_dim != text_width:
        raise MobiusError(
            f"the text encoder {text_source} is {text_width} wide but the UNet's cross_attention_dim is"
            f" {unet.config.cross_attention_dim}: choose a text encoder that fits in text_encoder_name_or_path"
        )
