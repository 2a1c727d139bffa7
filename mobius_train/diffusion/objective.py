"""The diffusion loss, over diffusers' noise schedulers.

Legend: B clips, C latent channels, F frames, h, w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from mobius_train.config import ObjectiveConfig
from mobius_train.diffusion.randomness import Draws
from mobius_train.errors import MobiusError


@dataclass(frozen=True)
class NoisyBatch:
    """sample: (B, C, F, h, w), what the model sees; target: the same shape, what it must predict; timesteps: (B,)."""

    sample: Tensor
    target: Tensor
    timesteps: Tensor


def training_scheduler(scheduler: DDPMScheduler, config: ObjectiveConfig) -> DDPMScheduler:
    """The pretrained scheduler with what the recipe changes in it."""
    changes: dict[str, object] = {}
    if config.prediction_type is not None:
        changes["prediction_type"] = config.prediction_type
    if config.rescale_betas_zero_snr:
        changes.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = DDPMScheduler.from_config(scheduler.config, **changes)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise MobiusError(
            f"the scheduler's prediction_type is {kind!r}; supported are epsilon and v_prediction:"
            " set objective.prediction_type"
        )
    if scheduler.config.rescale_betas_zero_snr and kind == "epsilon":
        raise MobiusError(
            "objective.rescale_betas_zero_snr needs objective.prediction_type=v_prediction: at the last timestep"
            " the sample is pure noise, and predicting the noise says nothing of the image (arXiv 2305.08891)"
        )
    return scheduler


def correlated(noise: Tensor, shared: Tensor, correlation: float) -> Tensor:
    """√ρ · shared + √(1 - ρ) · noise: unit variance, correlation ρ between a clip's frames (arXiv 2305.10474)."""
    if correlation == 0:
        return noise
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * noise


class DiffusionObjective:
    """E ‖target - model(noisy sample)‖², weighted by min-SNR when asked for."""

    def __init__(self, scheduler: DDPMScheduler, config: ObjectiveConfig) -> None:
        self.config = config
        self.scheduler = training_scheduler(scheduler, config)
        self.num_timesteps = int(self.scheduler.config.num_train_timesteps)

    def noisy(self, latents: Tensor, draws: Draws, timesteps: Tensor | None = None) -> NoisyBatch:
        """Noise latents (B, C, F, h, w) at the drawn timesteps, or at `timesteps` (B,) when given."""
        noise = correlated(draws.noise, draws.shared, self.config.frame_noise_correlation)
        noise = (noise + self.config.noise_offset * draws.offset).to(latents)
        if timesteps is None:
            timesteps = (draws.timestep * self.num_timesteps).long()
        timesteps = timesteps.to(latents.device)
        sample = self.scheduler.add_noise(latents, noise, timesteps)
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        return NoisyBatch(sample, target, timesteps)

    def keep_caption(self, draws: Draws) -> Tensor:
        """(B,) bool: the captions that are not emptied."""
        return draws.dropout >= self.config.caption_dropout

    def loss(self, prediction: Tensor, noisy: NoisyBatch) -> Tensor:
        """(B,) float32: every sample's mean squared error, weighted."""
        error = (prediction.float() - noisy.target.float()).square().flatten(1).mean(1)
        return error * self._weight(noisy.timesteps)

    def _weight(self, timesteps: Tensor) -> Tensor:
        """min-SNR-γ: min(SNR, γ) / SNR for epsilon, min(SNR, γ) / (SNR + 1) for v (arXiv 2303.09556)."""
        if self.config.snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps).float()
        capped = snr.clamp(max=self.config.snr_gamma)
        return capped / (snr + 1 if self.scheduler.config.prediction_type == "v_prediction" else snr)
