"""Sampling of latents, with classifier-free guidance.

Legend: B clips, C latent channels, F frames, h, w latent size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from mobius_train.diffusion.randomness import correlate_frames, sample_generator
from mobius_train.errors import MobiusError


def sampling_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The sampler for the noise schedule of the given scheduler.

    Euler steps for flow matching, otherwise DDIM (arXiv 2010.02502).
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    # diffusers clips samples to [-1, 1] by default, which suits pixels but not unbounded latents.
    changes: dict[str, object] = {"clip_sample": False}
    if getattr(scheduler.config, "rescale_betas_zero_snr", False):
        # Sampling must start at the last timestep, the only one with pure noise (arXiv 2305.08891).
        changes["timestep_spacing"] = "trailing"
    return DDIMScheduler.from_config(scheduler.config, **changes)


def prompt_generator(seed: int, prompt: str) -> torch.Generator:
    """A CPU generator that depends only on the seed and the prompt, not on other prompts."""
    return sample_generator(seed, int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]))


def initial_noise(shape: tuple[int, int, int, int], generator: torch.Generator, correlation: float = 0.0) -> Tensor:
    """Standard normal noise (1, C, F, h, w) of one clip; shape is (C, F, h, w).

    Args:
        correlation: correlation of the noise between frames, as in training.
    """
    channels, num_frames, height, width = shape

    def draw() -> Tensor:
        return torch.randn(channels, height, width, generator=generator, device=generator.device)

    # Drawn frame by frame, so that stills and clips of any length start with the same noise.
    shared = draw().unsqueeze(1)
    noise = torch.stack([draw() for _ in range(num_frames)], dim=1)
    return correlate_frames(noise, shared, correlation).unsqueeze(0)


def guided_prediction(unconditional: Tensor, conditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: u + scale · (c - u) (arXiv 2207.12598).

    Args:
        rescale: weight of the result rescaled to the standard deviation of the conditional prediction, which avoids
            overexposed pictures; 0.7 suits models with zero terminal SNR (arXiv 2305.08891, section 3.4).
    """
    prediction = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return prediction
    dims = list(range(1, prediction.ndim))
    factor = conditional.std(dims, keepdim=True) / prediction.std(dims, keepdim=True)
    return prediction * (rescale * factor + 1 - rescale)


def denoise_latents(
    scheduler: SchedulerMixin,
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    num_inference_steps: int,
    after_step: Callable[[], object],
) -> Tensor:
    """Denoise (B, C, F, h, w) in float32; returns latents of the same shape.

    Args:
        predict: (noisy latents, timestep ()) → prediction of the scheduler's prediction_type.
        after_step: called after every step, for a progress bar.

    Raises:
        MobiusError: num_inference_steps is less than 1 or more than the model's timesteps.
    """
    num_timesteps = int(scheduler.config.num_train_timesteps)
    if not 1 <= num_inference_steps <= num_timesteps:
        raise MobiusError(f"num_inference_steps={num_inference_steps} must be between 1 and {num_timesteps}")
    scheduler.set_timesteps(num_inference_steps)
    # Flow matching has neither of these methods: it starts from the noise itself.
    latents = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        prediction = predict(scaled, timestep.to(latents.device))
        latents = scheduler.step(prediction.float(), timestep, latents).prev_sample
        after_step()
    return latents
