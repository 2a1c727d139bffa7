"""The objective against its equations."""

import pytest
import torch
from diffusers import DDPMScheduler

from mobius_train.config import ObjectiveConfig
from mobius_train.diffusion.objective import DiffusionObjective, correlated
from mobius_train.diffusion.randomness import draw
from mobius_train.errors import MobiusError

SHAPE = (4, 3, 8, 8)
V = {"prediction_type": "v_prediction"}


def objective(**config: object) -> DiffusionObjective:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return DiffusionObjective(scheduler, ObjectiveConfig(**config))


def alphas(o: DiffusionObjective, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = o.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_noisy_sample_and_the_target_follow_the_equations(kind: str) -> None:
    o = objective(prediction_type=kind)
    draws, latents = draw(0, torch.arange(2), SHAPE), torch.randn(2, *SHAPE)
    noisy = o.noisy(latents, draws)
    signal, noise = alphas(o, noisy.timesteps)
    torch.testing.assert_close(noisy.sample, signal * latents + noise * draws.noise)
    target = draws.noise if kind == "epsilon" else signal * draws.noise - noise * latents
    torch.testing.assert_close(noisy.target, target)
    assert torch.equal(o.loss(noisy.target, noisy), torch.zeros(2))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights(kind: str) -> None:
    o, plain = objective(prediction_type=kind, snr_gamma=5), objective(prediction_type=kind)
    draws = draw(0, torch.arange(3), SHAPE)
    timesteps = torch.tensor([10, 400, 990])
    noisy = o.noisy(torch.randn(3, *SHAPE), draws, timesteps)
    prediction = torch.randn(3, *SHAPE)
    a = o.scheduler.alphas_cumprod[timesteps]
    snr = a / (1 - a)
    weight = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(o.loss(prediction, noisy), plain.loss(prediction, noisy) * weight)


def test_zero_terminal_snr_makes_the_last_timestep_pure_noise() -> None:
    last = torch.tensor([999])
    draws, latents = draw(0, torch.arange(1), SHAPE), torch.randn(1, *SHAPE)
    o = objective(rescale_betas_zero_snr=True, **V)
    torch.testing.assert_close(o.noisy(latents, draws, last).sample, draws.noise, atol=1e-3, rtol=0)
    # The schedule as it comes leaves some signal there.
    plain = objective(**V).noisy(latents, draws, last).sample
    assert (plain - draws.noise).abs().max() > 0.05


def test_zero_terminal_snr_refuses_epsilon() -> None:
    with pytest.raises(MobiusError, match="v_prediction"):
        objective(rescale_betas_zero_snr=True, prediction_type="epsilon")


def test_an_unsupported_prediction_type_is_named() -> None:
    with pytest.raises(MobiusError, match="'sample'"):
        DiffusionObjective(DDPMScheduler(prediction_type="sample"), ObjectiveConfig())


def test_noise_offset_shifts_whole_channels() -> None:
    draws, zeros = draw(0, torch.arange(2), SHAPE), torch.zeros(2, *SHAPE)
    t = torch.tensor([500, 500])
    difference = objective(noise_offset=0.1).noisy(zeros, draws, t).target - draws.noise
    torch.testing.assert_close(difference, (0.1 * draws.offset).expand_as(difference), atol=1e-6, rtol=0)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_frame_noise_has_unit_variance_and_the_asked_correlation(correlation: float) -> None:
    draws = draw(0, torch.arange(500), (4, 2, 8, 8))
    noise = correlated(draws.noise, draws.shared, correlation)
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise[:, :, 0] * noise[:, :, 1]).mean()) - correlation) < 0.02


def test_captions_are_dropped_at_the_asked_rate() -> None:
    draws = draw(0, torch.arange(2000), (1, 1, 1, 1))
    assert abs(float(objective(caption_dropout=0.1).keep_caption(draws).float().mean()) - 0.9) < 0.03
    assert bool(objective(caption_dropout=0.0).keep_caption(draws).all())
