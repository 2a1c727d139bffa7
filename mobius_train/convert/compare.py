"""Comparison of two models on fixed inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mobius_train.models import ImageUNet, weights_hash

FRAMES, LATENT_SIZE, TOKENS = 3, 16, 8
# Kernels may sum in another order; a wrong weight causes a much larger difference.
TOLERANCE = 1e-4
# Each step of sampling with guidance amplifies the difference.
SAMPLING_TOLERANCE = 1e-3


@torch.no_grad()
def prediction(model: Any) -> Tensor:
    """The output (2, C, F, h, w) of a 3D UNet, ours or diffusers', for fixed latents, timesteps and text."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, model.config.in_channels, FRAMES, LATENT_SIZE, LATENT_SIZE, generator=generator)
    text = torch.randn(2, TOKENS, model.config.cross_attention_dim, generator=generator)
    timestep = torch.tensor([801, 17])
    return model(sample.to(model.dtype), timestep, text.to(model.dtype), return_dict=False)[0].float()


def prediction_of_stills(unet: Any) -> Tensor:
    """The output of a 2D UNet for the same inputs, frame by frame."""
    return prediction(ImageUNet(unet))


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


def sampled(pipeline: Callable[..., Any], latents: Tensor, **options: Any) -> Tensor:
    """Sample latents (1, C, F, h, w) with a pipeline, ours or diffusers', from given noise in three steps."""
    frames = pipeline(
        "a dog", latents=latents.clone(), num_inference_steps=3, output_type="latent", return_dict=False, **options
    )[0]
    return torch.as_tensor(frames).float()
