"""The densities of training timesteps against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mobius_train.config_sections import ObjectiveConfig
from mobius_train.diffusion.timesteps import training_quantiles

# Evenly spaced, so that shares below are exact up to the spacing.
UNIFORM = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


def quantiles(**config: object) -> Tensor:
    return training_quantiles(UNIFORM, ObjectiveConfig.model_validate(config))


def share(positions: Tensor, low: float, high: float) -> float:
    return float(((positions >= low) & (positions < high)).double().mean())


def test_uniform_draws_are_as_they_were() -> None:
    assert quantiles() is UNIFORM


def test_later_multiplies_the_probability_of_the_last_part() -> None:
    positions = quantiles(timestep_sampling="later", timestep_bias_portion=0.25, timestep_bias_multiplier=4)
    # Masses 0.75 and 0.25 x 4.
    assert share(positions, 0, 0.75) == pytest.approx(0.75 / 1.75, abs=1e-4)
    assert share(positions, 0.75, 1) == pytest.approx(1 / 1.75, abs=1e-4)
    # Even within each part.
    assert share(positions, 0.75, 0.875) == pytest.approx(0.5 / 1.75, abs=1e-4)
    assert share(positions, 0, 0.25) == pytest.approx(0.25 / 1.75, abs=1e-4)


def test_the_default_bias_has_the_median_of_a_linear_density() -> None:
    """t = T √u has a density that grows linearly with t; a quarter of it lies below T / 2."""
    positions = quantiles(timestep_sampling="later")
    assert share(positions, 0, 0.5) == pytest.approx(0.25, abs=1e-4)
    assert (positions - UNIFORM.sqrt()).abs().max() < 0.13


def test_logit_normal_is_normal_in_the_logits() -> None:
    logits = quantiles(timestep_sampling="logit_normal", logit_mean=0.5, logit_std=1.5).logit()
    assert float(logits.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(logits.std()) == pytest.approx(1.5, abs=1e-3)
    within = float(((logits - 0.5).abs() < 1.5).double().mean())
    assert within == pytest.approx(math.erf(1 / math.sqrt(2)), abs=1e-3)


@pytest.mark.parametrize("sampling", ["uniform", "later", "logit_normal"])
def test_every_draw_is_a_position_in_the_schedule_and_the_order_is_kept(sampling: str) -> None:
    ends = torch.tensor([0.0, 1e-8, 0.5, 1 - 2**-24])
    positions = training_quantiles(ends, ObjectiveConfig(timestep_sampling=sampling))
    assert positions.isfinite().all()
    assert (positions >= 0).all()
    assert (positions <= 1).all()
    assert (positions.diff() >= 0).all()
