"""Flow matching along straight lines, as in Stable Diffusion 3.

Legend: B clips, C latent channels, F frames, h, w latent size; σ position on the line, from 0 (data) to 1 (noise).
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mobius_train.config_sections import ObjectiveConfig
from mobius_train.devices import sent
from mobius_train.diffusion.process import NoisyBatch
from mobius_train.diffusion.randomness import Draws
from mobius_train.diffusion.timesteps import training_quantiles
from mobius_train.errors import MobiusError

# Fields of the objective that belong to other processes.
NOT_FOR_FLOW = ("prediction_type", "snr_gamma", "rescale_betas_zero_snr")


class FlowProcess:
    """Rectified flow (arXiv 2209.03003) with the timestep shift of Stable Diffusion 3 (arXiv 2403.03206); see Process.

        x_σ    = (1 - σ) x_0 + σ ε,  one σ for all frames of a clip
        target = ε - x_0
        σ      = s q / (1 + (s - 1) q),  q with the density `timestep_sampling`, s the shift (Eq. 23)

    The model's timestep input is 1000 σ, for a scheduler of 1000 timesteps; it is not rounded. Every clip has weight 1.

    Args:
        scheduler: `objective.flow_shift` replaces its shift.

    Raises:
        MobiusError: the recipe sets fields of another process, or the scheduler's shift depends on the resolution.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, config: ObjectiveConfig) -> None:
        for name in NOT_FOR_FLOW:
            if getattr(config, name) != ObjectiveConfig.model_fields[name].default:
                raise MobiusError(
                    f"objective.{name} has no meaning for flow matching, which the scheduler of this model requires"
                    f" ({type(scheduler).__name__}): remove it"
                )
        if scheduler.config.use_dynamic_shifting and config.flow_shift is None:
            raise MobiusError(
                "the scheduler's shift depends on the resolution (use_dynamic_shifting): set objective.flow_shift to"
                " the shift of this training"
            )
        self.config = config
        changes: dict[str, object] = {"use_dynamic_shifting": False}
        if config.flow_shift is not None:
            changes["shift"] = config.flow_shift
        self.scheduler: FlowMatchEulerDiscreteScheduler = type(scheduler).from_config(scheduler.config, **changes)
        self.num_timesteps = int(self.scheduler.config.num_train_timesteps)

    def noisy(self, latents: Tensor, draws: Draws, quantile: float | None = None) -> NoisyBatch:
        noise = draws.correlated_noise(self.config.frame_noise_correlation, self.config.noise_offset)
        noise = sent(noise, latents.device, latents.dtype)
        if quantile is None:
            positions = training_quantiles(draws.timestep, self.config)
        else:
            positions = torch.full((len(latents),), quantile)
        sigmas = sent(self._shifted(positions.double()), latents.device, latents.dtype)
        mixed = sigmas.view(-1, 1, 1, 1, 1)
        sample = (1 - mixed) * latents + mixed * noise
        return NoisyBatch(sample, noise - latents, sigmas * self.num_timesteps, torch.ones_like(sigmas).float())

    @property
    def ignores_high_noise(self) -> bool:
        """See Process: every σ has the same weight."""
        return False

    def _shifted(self, positions: Tensor) -> Tensor:
        shift = self.scheduler.config.shift
        return shift * positions / (1 + (shift - 1) * positions)
