"""The density of training timesteps, as a function of one uniform number per sample.

The density is given over q, the position in the noise schedule: 0 is the clean end, 1 is pure noise. A sample's
timestep is floor(q · number of timesteps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobius_train.config_sections import ObjectiveConfig


def training_quantiles(uniform: Tensor, config: ObjectiveConfig) -> Tensor:
    """Map uniform numbers in [0, 1) to positions q that have the density `timestep_sampling`.

        uniform       q = u
        later         the last `timestep_bias_portion` p of the timesteps is `timestep_bias_multiplier` m times as
                      likely as the others, as with `--timestep_bias_strategy later` in diffusers' scripts
        logit_normal  q = sigmoid(logit_mean + logit_std · Φ⁻¹(u))             (arXiv 2403.03206, Eq. 19)

    Args:
        uniform: (B,), float.

    Returns:
        (B,), in [0, 1].
    """
    if config.timestep_sampling == "later":
        late, multiplier = config.timestep_bias_portion, config.timestep_bias_multiplier
        early = 1 - late
        # Probability of the early part.
        below = early / (early + late * multiplier)
        return torch.where(uniform < below, uniform / below * early, early + (uniform - below) / (1 - below) * late)
    if config.timestep_sampling == "logit_normal":
        return torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(uniform))
    return uniform
