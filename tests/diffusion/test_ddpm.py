"""The DDPM process against its equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from mobius_train.config_sections import ObjectiveConfig
from mobius_train.diffusion.ddpm import DdpmProcess
from mobius_train.diffusion.randomness import Draws, correlate_frames, draw_numbers
from mobius_train.diffusion.sampler import sampling_scheduler
from mobius_train.errors import MobiusError
from mobius_train.tasks.denoising import squared_error

SHAPE = (4, 3, 8, 8)
V = {"prediction_type": "v_prediction"}


def process(**config: object) -> DdpmProcess:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return DdpmProcess(scheduler, ObjectiveConfig(**config))


def at(draws: Draws, *timesteps: int) -> Draws:
    """The same draws, of these timesteps of 1000."""
    return replace(draws, timestep=(torch.tensor(timesteps) + 0.5) / 1000)


def alphas(o: DdpmProcess, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = o.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_noisy_sample_and_the_target_follow_the_equations(kind: str) -> None:
    o = process(prediction_type=kind)
    draws, latents = draw_numbers(0, torch.arange(2), SHAPE), torch.randn(2, *SHAPE)
    noisy = o.noisy(latents, draws)
    signal, noise = alphas(o, noisy.timesteps)
    torch.testing.assert_close(noisy.sample, signal * latents + noise * draws.noise)
    target = draws.noise if kind == "epsilon" else signal * draws.noise - noise * latents
    torch.testing.assert_close(noisy.target, target)
    assert torch.equal(squared_error(noisy.target, noisy), torch.zeros(2))
    assert torch.equal(noisy.weight, torch.ones(2))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights(kind: str) -> None:
    o = process(prediction_type=kind, snr_gamma=5)
    timesteps = torch.tensor([10, 400, 990])
    noisy = o.noisy(torch.randn(3, *SHAPE), at(draw_numbers(0, torch.arange(3), SHAPE), *timesteps))
    assert torch.equal(noisy.timesteps, timesteps)
    a = o.scheduler.alphas_cumprod[timesteps]
    snr = a / (1 - a)
    torch.testing.assert_close(noisy.weight, snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1))


def test_a_quantile_is_one_timestep_for_all_clips() -> None:
    o, draws = process(), draw_numbers(0, torch.arange(3), SHAPE)
    for quantile, timestep in ((0.0, 0), (0.5, 499), (1.0, 999)):
        assert o.noisy(torch.zeros(3, *SHAPE), draws, quantile).timesteps.tolist() == [timestep] * 3


def test_the_sampler_has_the_schedule_that_was_trained() -> None:
    o = process(rescale_betas_zero_snr=True, **V)
    sampler = sampling_scheduler(o.scheduler)
    assert isinstance(sampler, DDIMScheduler)
    assert torch.equal(sampler.alphas_cumprod, o.scheduler.alphas_cumprod)
    assert sampler.config.prediction_type == "v_prediction"


def test_zero_terminal_snr_makes_the_last_timestep_pure_noise() -> None:
    draws, latents = draw_numbers(0, torch.arange(1), SHAPE), torch.randn(1, *SHAPE)
    o = process(rescale_betas_zero_snr=True, **V)
    torch.testing.assert_close(o.noisy(latents, draws, 1.0).sample, draws.noise, atol=1e-3, rtol=0)
    # The schedule as it comes leaves some signal there.
    plain = process(**V).noisy(latents, draws, 1.0).sample
    assert (plain - draws.noise).abs().max() > 0.05


def test_zero_terminal_snr_refuses_epsilon() -> None:
    with pytest.raises(MobiusError, match="v_prediction"):
        process(rescale_betas_zero_snr=True, prediction_type="epsilon")


def test_an_unsupported_prediction_type_is_named() -> None:
    with pytest.raises(MobiusError, match="'sample'"):
        DdpmProcess(DDPMScheduler(prediction_type="sample"), ObjectiveConfig())


def test_noise_offset_shifts_whole_channels() -> None:
    draws, zeros = draw_numbers(0, torch.arange(2), SHAPE), torch.zeros(2, *SHAPE)
    difference = process(noise_offset=0.1).noisy(zeros, draws).target - draws.noise
    torch.testing.assert_close(difference, (0.1 * draws.offset).expand_as(difference), atol=1e-6, rtol=0)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_frame_noise_has_unit_variance_and_the_asked_correlation(correlation: float) -> None:
    draws = draw_numbers(0, torch.arange(500), (4, 2, 8, 8))
    noise = correlate_frames(draws.noise, draws.shared, correlation)
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise[:, :, 0] * noise[:, :, 1]).mean()) - correlation) < 0.02


@pytest.mark.parametrize("sampling", ["later", "logit_normal"])
def test_the_timesteps_follow_the_recipes_density(sampling: str) -> None:
    draws = at(draw_numbers(0, torch.arange(4), SHAPE), 0, 250, 500, 999)
    latents = torch.randn(4, *SHAPE)
    uniform = process().noisy(latents, draws).timesteps
    biased = process(timestep_sampling=sampling, logit_mean=1.0).noisy(latents, draws).timesteps
    assert biased[1] > uniform[1]
    assert biased.max() <= 999
