"""The interface of a diffusion process for training and sampling.

Legend: B clips, C latent channels, F frames, h, w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from diffusers import SchedulerMixin
from torch import Tensor

from mobius_train.diffusion.randomness import Draws


@dataclass(frozen=True)
class NoisyBatch:
    """A training batch of the denoiser.

    Attributes:
        sample: (B, C, F, h, w), the model's input.
        target: the same shape, the target of the prediction.
        timesteps: (B,), the model's timestep input.
        weight: (B,) float32, weight of each clip's loss.
    """

    sample: Tensor
    target: Tensor
    timesteps: Tensor
    weight: Tensor


class Process(Protocol):
    """The mixing of noise into latents, and the target that a model predicts from the mixture."""

    scheduler: SchedulerMixin
    """Saved with the model; records the noise schedule and the prediction type of its training."""

    def noisy(self, latents: Tensor, draws: Draws, quantile: float | None = None) -> NoisyBatch:
        """Mix noise into latents (B, C, F, h, w).

        Args:
            draws: random numbers of the clips.
            quantile: position in the noise schedule, in [0, 1], for all clips instead of random timesteps; used for
                held-out losses.
        """

    @property
    def ignores_high_noise(self) -> bool:
        """The weight of the loss goes to 0 where the sample is nearly noise."""
