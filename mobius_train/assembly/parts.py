"""Build the parts of a run from a recipe.

The order is fixed: load, check that the parts fit each other, freeze, apply options, cast. The tensors come from one of
the sources in `weights.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import nn

from mobius_train.assembly.new_configs import check_new_configs
from mobius_train.assembly.options import (
    apply_attention_backend,
    apply_memory_options,
    check_device,
    set_memory_format,
)
from mobius_train.assembly.weights import Pretrained, WeightSource, text_source
from mobius_train.bars import DELAY, progress
from mobius_train.config import RunConfig
from mobius_train.diffusion.build_process import build_process
from mobius_train.diffusion.process import Process
from mobius_train.dtypes import Dtypes
from mobius_train.encoders.encoders import Encoders
from mobius_train.encoders.fit import check_latents, check_positions, check_side, check_text
from mobius_train.encoders.image_encoder import ImageEncoder
from mobius_train.encoders.text_encoding import TextEncoding, components_of
from mobius_train.errors import MobiusError
from mobius_train.job.environment import is_rank_zero
from mobius_train.models import Denoiser, build_denoiser, weights_hash
from mobius_train.models.choose_attention import Machine
from mobius_train.models.families import as_denoiser
from mobius_train.pipeline import TextToVideoPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The models of a text-to-image or text-to-video recipe, and its diffusion process.

    Attributes:
        denoiser: `denoiser.trained` is in float32 on the device where it was created, before an engine wraps it;
            `denoiser.frozen` is in `dtypes.frozen` on the run's device.
        encoders: frozen, on the run's device; text encoders in host memory if the recipe requires a full cache.
        attention: one line for each kind of attention, with the kernel and the reason.
    """

    config: RunConfig
    denoiser: Denoiser
    process: Process
    encoders: Encoders
    dtypes: Dtypes
    attention: tuple[str, ...]

    def pipeline(self, model: nn.Module, text_encoders: Mapping[str, nn.Module] | None = None) -> TextToVideoPipeline:
        """The pipeline that samples with the recipe's settings.

        Args:
            model: the result of `denoiser.with_trained`.
            text_encoders: by part; replace the run's text encoders if those are sharded.
        """
        text, recipe = self.encoders.text, self.config
        return TextToVideoPipeline(
            vae=self.encoders.images.vae,
            **(components_of(text) | dict(text_encoders or {})),
            unet=model,
            scheduler=self.process.scheduler,
            max_text_tokens=text.max_tokens,
            num_frames=1 if recipe.stage == "text-to-image" else recipe.data.num_frames,
            resolution=recipe.data.resolution,
            guidance_scale=recipe.validation.guidance_scale,
            frame_noise_correlation=recipe.objective.frame_noise_correlation,
        )


@dataclass(frozen=True)
class LoadedParts:
    """The loaded parts of a recipe, before the denoiser is built."""

    image_or_video_model: nn.Module
    process: Process
    vae: AutoencoderKL
    text: TextEncoding


def load_parts(config: RunConfig, weights: WeightSource, device: torch.device) -> LoadedParts:
    """Load a recipe's models and check that they fit each other: the fast half of `parts_of`.

    Raises:
        MobiusError: a model is missing or damaged, the parts do not fit each other, or the device does not support an
            option.
    """
    check_device(config, device)
    check_new_configs(config)
    with progress(total=3, desc="loading", unit="model", delay=DELAY, leave=False, disable=not is_rank_zero()) as bar:
        model = _model_of(config, weights)
        bar.update()
        process = build_process(weights.scheduler(config), config.objective)
        if config.stage == "text-to-video" and process.ignores_high_noise:
            logger.warning(
                "objective.snr_gamma with v-prediction gives timesteps of high noise nearly no weight, and motion is"
                " decided there: remove it, and see objective.timestep_sampling"
            )
        vae = weights.autoencoder(config)
        bar.update()
        denoiser = as_denoiser(model)
        check_latents(denoiser, vae.config)
        check_resolution(config, vae, denoiser.image_model)
        text = _text_of(config, weights, device, denoiser.backbone.condition_widths)
        check_text(denoiser, text, text_source(config))
        bar.update()
    return LoadedParts(model, process, vae, text)


def _text_of(config: RunConfig, weights: WeightSource, device: torch.device, wanted: Mapping[str, int]) -> TextEncoding:
    dtype, host = Dtypes.of(config).text, torch.device("meta" if device.type == "meta" else "cpu")
    # With a full cache they encode only the prompts, and T5 is larger than most GPUs.
    place = host if config.data.cache_required else device
    if dtype == torch.float32:
        return weights.text_encoding(config, place, wanted)
    text = weights.text_encoding(config, host, wanted)
    for encoder in text.encoders.values():
        encoder.model.to(dtype).to(place)
    return text


def _model_of(config: RunConfig, weights: WeightSource) -> nn.Module:
    # Every rank must draw the same new weights.
    torch.manual_seed(config.seed)
    return weights.image_or_video_model(config)


def frozen_hash_in(config: RunConfig, dtype: torch.dtype) -> str:
    """Load a recipe's frozen weights anew, and return their hash in this type; empty if there are none."""
    assert config.stage != "autoencoder"
    with torch.random.fork_rng():
        frozen = build_denoiser(_model_of(config, Pretrained()), config.stage, config.mode, config.ring_fields()).frozen
    return "" if frozen is None else weights_hash(frozen, dtype)


def build_parts(config: RunConfig, loaded: LoadedParts, weights: WeightSource, device: torch.device) -> Parts:
    """Build the parts of a run from the loaded models: the slow half of `parts_of`.

    Raises:
        MobiusError: the model cannot be trained with the recipe's options.
    """
    assert config.stage != "autoencoder"
    with weights.making_layers():
        denoiser = build_denoiser(loaded.image_or_video_model, config.stage, config.mode, config.ring_fields())
    check_scaled_gradients(denoiser, config)
    apply_memory_options(denoiser, config)
    attention = apply_attention_backend(denoiser, config, Machine.of(device))
    dtypes = Dtypes.of(config)
    # The engine keeps float32 master weights of the trained part; a frozen branch needs none.
    if denoiser.frozen is not None:
        denoiser.frozen.to(device, dtypes.frozen)
        set_memory_format(denoiser, config)
    weights.fill(denoiser)
    wanted = frozenset(denoiser.backbone.condition_widths)
    encoders = Encoders(ImageEncoder(loaded.vae, device), loaded.text, wanted)
    return Parts(config, denoiser, loaded.process, encoders, dtypes, tuple(attention))


def check_scaled_gradients(denoiser: Denoiser, config: RunConfig) -> None:
    """
    Raises:
        MobiusError: gradients flow through frozen layers in fp16, and no loss scale keeps them from vanishing.
    """
    if config.frozen_dtype == "fp16" and config.mixed_precision != "fp16" and denoiser.frozen_in_graph():
        raise MobiusError(
            "frozen_dtype=fp16 with frozen blocks behind the fusion: gradients flow through them, and"
            f" mixed_precision={config.mixed_precision} does not scale them for fp16. Use the same dtype"
        )


def parts_of(config: RunConfig, weights: WeightSource, device: torch.device) -> Parts:
    """Load and build the parts of a recipe with tensors from the given source.

    Args:
        device: the run's device.

    Raises:
        MobiusError: see `load_parts` and `build_parts`.
    """
    return build_parts(config, load_parts(config, weights, device), weights, device)


def autoencoder_of(config: RunConfig, weights: WeightSource, device: torch.device) -> AutoencoderKL:
    """The model that stage autoencoder trains, in float32.

    Raises:
        MobiusError: it is missing or damaged, or does not support the recipe's sizes.
    """
    check_device(config, device)
    check_new_configs(config)
    torch.manual_seed(config.seed)
    vae = weights.autoencoder(config)
    check_resolution(config, vae)
    return vae


def check_resolution(config: RunConfig, vae: AutoencoderKL, image_model: nn.Module | None = None) -> None:
    """
    Raises:
        MobiusError: the models do not take a size in the recipe; see `check_side`.
    """
    sides = {"data.resolution": config.data.resolution}
    for number, bucket in enumerate(config.data.buckets or ()):
        sides |= {f"data.buckets.{number}.width": bucket.width, f"data.buckets.{number}.height": bucket.height}
    for name, pixels in sides.items():
        check_side(name, pixels, image_model, vae.config)
    if image_model is not None:
        sizes = [(bucket.width, bucket.height) for bucket in config.data.buckets or ()]
        for size in (config.data.resolution, config.data.resolution), *sizes:
            check_positions(size, image_model, vae.config, config.sequence_parallel_size)
