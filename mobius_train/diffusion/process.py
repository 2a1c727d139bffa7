"""The diffusion process as training and sampling see it.

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
    """What a denoiser is trained on.

    Attributes:
        sample: (B, C, F, h, w), what the model sees.
        target: the same shape, what it must predict.
        timesteps: (B,), as the model takes them.
        weight: (B,) float32, of each clip's loss.
    """

    sample: Tensor
    target: Tensor
    timesteps: Tensor
    weight: Tensor


class Process(Protocol):
    """How noise is mixed into latents, and what a model predicts of the mixture."""

    scheduler: SchedulerMixin
    """Saved with the model; it says what the model was trained for."""

    def noisy(self, latents: Tensor, draws: Draws, quantile: float | None = None) -> NoisyBatch:
        """Mix noise into latents (B, C, F, h, w).

        Args:
            draws: the clips' random numbers.
            quantile: take this share of the noise schedule, in [0, 1], for all clips instead of drawn ones; for
                held-out losses.
        """

    def sampler(self) -> SchedulerMixin:
        """The scheduler to sample with."""


def squared_error(prediction: Tensor, noisy: NoisyBatch) -> Tensor:
    """(B,) float32: every clip's mean squared error, without weight."""
    return (prediction.float() - noisy.target.float()).square().flatten(1).mean(1)
