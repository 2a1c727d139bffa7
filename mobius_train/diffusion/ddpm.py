"""The DDPM process on top of diffusers' noise schedulers.

Legend: B clips, C latent channels, F frames, h, w latent size.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from mobius_train.config_sections import ObjectiveConfig
from mobius_train.devices import sent
from mobius_train.diffusion.process import NoisyBatch
from mobius_train.diffusion.randomness import Draws
from mobius_train.diffusion.timesteps import training_quantiles
from mobius_train.errors import MobiusError


def training_scheduler(scheduler: DDPMScheduler, config: ObjectiveConfig) -> DDPMScheduler:
    """The pretrained scheduler with the recipe's changes."""
    changes: dict[str, object] = {}
    if config.prediction_type is not None:
        changes["prediction_type"] = config.prediction_type
    if config.rescale_betas_zero_snr:
        changes.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = DDPMScheduler.from_config(scheduler.config, **changes)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise MobiusError(
            f"the scheduler's prediction_type {kind!r} is not supported: set objective.prediction_type to epsilon or"
            " v_prediction"
        )
    if scheduler.config.rescale_betas_zero_snr and kind == "epsilon":
        raise MobiusError(
            "objective.rescale_betas_zero_snr needs objective.prediction_type=v_prediction: at the last timestep the"
            " sample is pure noise, and predicting it gives no information about the image (arXiv 2305.08891)"
        )
    return scheduler


class DdpmProcess:
    """DDPM (arXiv 2006.11239) with the schedule of a diffusers scheduler; see Process.

    The target is the noise, or the velocity √ᾱ ε - √(1 - ᾱ) x_0 (arXiv 2202.00512). The weight is 1, or min-SNR-γ:
    min(SNR, γ) / SNR for the noise, min(SNR, γ) / (SNR + 1) for the velocity (arXiv 2303.09556).

    Raises:
        MobiusError: the scheduler's prediction_type is not supported, or conflicts with the recipe.
    """

    def __init__(self, scheduler: DDPMScheduler, config: ObjectiveConfig) -> None:
        self.config = config
        self.scheduler = training_scheduler(scheduler, config)
        self.num_timesteps = int(self.scheduler.config.num_train_timesteps)

    def noisy(self, latents: Tensor, draws: Draws, quantile: float | None = None) -> NoisyBatch:
        noise = draws.correlated_noise(self.config.frame_noise_correlation, self.config.noise_offset)
        noise = sent(noise, latents.device, latents.dtype)
        if quantile is None:
            positions = training_quantiles(draws.timestep, self.config) * self.num_timesteps
            timesteps = positions.long().clamp(max=self.num_timesteps - 1)
        else:
            timesteps = torch.full((len(latents),), int(quantile * (self.num_timesteps - 1)))
        timesteps = sent(timesteps, latents.device)
        sample = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps) if self._predicts_velocity else noise
        return NoisyBatch(sample, target, timesteps, self._weight(timesteps))

    @property
    def ignores_high_noise(self) -> bool:
        """See Process: min(SNR, γ) / (SNR + 1) goes to 0 with the SNR."""
        return self._predicts_velocity and self.config.snr_gamma is not None

    @property
    def _predicts_velocity(self) -> bool:
        return self.scheduler.config.prediction_type == "v_prediction"

    def _weight(self, timesteps: Tensor) -> Tensor:
        if self.config.snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps).float()
        capped = snr.clamp(max=self.config.snr_gamma)
        return capped / (snr + 1 if self._predicts_velocity else snr)
