"""Comparison of two models on fixed inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import UNet3DConditionModel
from torch import Tensor, nn

from mobius_train.conditions import MASK, POOLED, SIZES, TEXT, Conditions
from mobius_train.models import weights_hash
from mobius_train.models.families import as_denoiser

FRAMES, LATENT_SIZE, TOKENS = 3, 16, 8
# Kernels may sum in another order; a wrong weight causes a much larger difference.
TOLERANCE = 1e-4
# Each step of sampling with guidance amplifies the difference.
SAMPLING_TOLERANCE = 1e-3


@torch.no_grad()
def prediction(model: Any) -> Tensor:
    """The output (2, C, F, h, w) for fixed latents, timesteps and conditions.

    Args:
        model: a video model, an image model, which runs frame by frame, or diffusers' UNet3DConditionModel.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, model.config.in_channels, FRAMES, LATENT_SIZE, LATENT_SIZE, generator=generator)
    sample, timestep = sample.to(model.dtype), torch.tensor([801, 17])
    if isinstance(model, UNet3DConditionModel):
        text = _conditions({TEXT: model.config.cross_attention_dim}, generator).to(dtype=model.dtype)[TEXT]
        return model(sample, timestep, text, return_dict=False)[0].float()
    denoiser = as_denoiser(model)
    conditions = _conditions(denoiser.backbone.condition_widths, generator).to(dtype=model.dtype)
    return denoiser.predict(sample, timestep, conditions).float()


def _conditions(widths: Mapping[str, int], generator: torch.Generator) -> Conditions:
    """Of two clips."""
    tensors = {TEXT: torch.randn(2, TOKENS, widths[TEXT], generator=generator)}
    if POOLED in widths:
        tensors[POOLED] = torch.randn(2, widths[POOLED], generator=generator)
    if SIZES in widths:
        tensors[SIZES] = torch.tensor([[512, 768, 0, 0, 512, 768], [1024, 1024, 8, 0, 512, 512]])
    if MASK in widths:
        tensors[MASK] = torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS // 2]])
    return Conditions(tensors)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference, relative to the largest absolute value of `other`."""
    return float((one - other).abs().max() / other.abs().max())


def hash_of(module: nn.Module, names: Iterable[str]) -> str:
    """`weights_hash` of the named tensors of a module."""
    container = nn.Module()
    state = module.state_dict()
    for name in names:
        # Buffer names must not contain dots.
        container.register_buffer(name.replace(".", "/"), state[name])
    return weights_hash(container)


def sampled(pipeline: Any, latents: Tensor, **options: Any) -> Tensor:
    """Sample latents (1, C, F, h, w) with a pipeline, ours or diffusers', from given noise in three steps.

    With so few steps diffusers' usual spacing begins at a middle timestep, where ours begins at the last one. Here both
    use the spacing `trailing`, which begins there too.
    """
    scheduler = pipeline.scheduler
    if "timestep_spacing" in scheduler.config:
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    try:
        frames = pipeline(
            "a dog", latents=latents.clone(), num_inference_steps=3, output_type="latent", return_dict=False, **options
        )[0]
    finally:
        pipeline.scheduler = scheduler
    return torch.as_tensor(frames).float()
