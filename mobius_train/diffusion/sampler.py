"""Sampling of latents, with classifier-free guidance.

Legend: B clips, C latent channels, F frames, h, w latent size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from mobius_train.diffusion.randomness import correlate_frames, sample_generator
from mobius_train.errors import MobiusError

# Share of the timesteps that sampling may skip at the noisy end.
MOST_LOST = 0.05


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
    elif getattr(scheduler.config, "timestep_spacing", None) == "linspace":
        # Other samplers' spacing, with which DDIM's steps would not end where the next ones begin.
        changes["timestep_spacing"] = "trailing"
    return DDIMScheduler.from_config(scheduler.config, **changes)


def is_flow(config: Mapping[str, Any]) -> bool:
    """The saved configuration of a scheduler is that of a flow-matching model."""
    return config.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__


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
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler,
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
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return _integrate(scheduler, predict, noise.float(), num_inference_steps, after_step)
    latents = noise.float() * scheduler.init_noise_sigma
    for timestep, following in set_timesteps(scheduler, num_inference_steps):
        prediction = predict(scheduler.scale_model_input(latents, timestep), timestep.to(latents.device))
        latents = ddim_step(scheduler, prediction.float(), int(timestep), following, latents)
        after_step()
    return latents


def _integrate(
    scheduler: FlowMatchEulerDiscreteScheduler,
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    num_inference_steps: int,
    after_step: Callable[[], object],
) -> Tensor:
    """Euler steps along the predicted velocity, from the noise at σ = 1."""
    scheduler.set_timesteps(num_inference_steps)
    for timestep in scheduler.timesteps:
        velocity = predict(latents, timestep.to(latents.device)).float()
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        after_step()
    return latents


def set_timesteps(scheduler: DDIMScheduler, num_inference_steps: int) -> list[tuple[Tensor, int]]:
    """Set the scheduler's timesteps, and return each (a tensor of shape ()) with the one that follows it.

    After the last one follows a negative number, which means no noise.

    diffusers rounds the distance of the timesteps down, and its usual spacing begins one distance below T. If there are
    few steps, or their number is far from a divisor of T, sampling would begin at a middle timestep, from which pure
    noise leads to wrong pictures. The timesteps then are spread evenly from T - 1 down instead.
    """
    total = int(scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(num_inference_steps)
    lost = max(total % num_inference_steps, total - 1 - int(scheduler.timesteps[0]))
    if lost <= MOST_LOST * total and int(scheduler.timesteps[0]) < total:
        return [(timestep, int(timestep) - total // num_inference_steps) for timestep in scheduler.timesteps]
    scheduler.timesteps = total - 1 - torch.arange(num_inference_steps) * total // num_inference_steps
    return list(zip(scheduler.timesteps, [*scheduler.timesteps[1:].tolist(), -1], strict=True))


def ddim_step(scheduler: DDIMScheduler, prediction: Tensor, timestep: int, following: int, sample: Tensor) -> Tensor:
    """From x_t to x at the following timestep, without new noise (arXiv 2010.02502, Eq. 12 with sigma = 0).

    diffusers' own step supports only following timesteps at one distance.
    """
    alpha = scheduler.alphas_cumprod[timestep]
    alpha_following = scheduler.alphas_cumprod[following] if following >= 0 else scheduler.final_alpha_cumprod
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        noise, clean = prediction, (sample - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
    elif kind == "v_prediction":
        noise = alpha.sqrt() * prediction + (1 - alpha).sqrt() * sample
        clean = alpha.sqrt() * sample - (1 - alpha).sqrt() * prediction
    else:
        noise, clean = (sample - alpha.sqrt() * prediction) / (1 - alpha).sqrt(), prediction
    return alpha_following.sqrt() * clean + (1 - alpha_following).sqrt() * noise
