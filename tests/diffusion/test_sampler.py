import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor

from mobius_train.diffusion.sampler import (
    ddim_step,
    denoise_latents,
    guided_prediction,
    initial_noise,
    prompt_generator,
    sampling_scheduler,
    set_timesteps,
)
from mobius_train.errors import MobiusError

SHAPE = (4, 6, 8, 8)


@pytest.mark.parametrize("kind", [DDPMScheduler, PNDMScheduler, DDIMScheduler])
def test_the_noise_schedule_is_kept_and_latents_are_not_clipped(kind: type) -> None:
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
    ddim = sampling_scheduler(scheduler)
    assert torch.equal(ddim.alphas_cumprod, scheduler.alphas_cumprod)
    assert ddim.config.prediction_type == "v_prediction"
    assert not ddim.config.clip_sample


def test_zero_terminal_snr_begins_at_pure_noise() -> None:
    config = {"prediction_type": "v_prediction", "timestep_spacing": "leading"}
    first = {}
    for zero in (True, False):
        ddim = sampling_scheduler(DDPMScheduler(rescale_betas_zero_snr=zero, **config))
        ddim.set_timesteps(10)
        first[zero] = float(ddim.alphas_cumprod[ddim.timesteps[0]])
    assert first[True] < 1e-6
    assert first[False] > 1e-6, "the other way shows that the check can fail"


def test_a_perfect_model_is_followed_to_the_image() -> None:
    """The velocity that leads to one image leads there from any noise."""
    image = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2
    scheduler = sampling_scheduler(DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))

    def velocity(sample: Tensor, timestep: Tensor) -> Tensor:
        alpha = scheduler.alphas_cumprod[timestep]
        noise = (sample - alpha.sqrt() * image) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * image

    steps: list[int] = []
    noise = initial_noise(SHAPE, prompt_generator(0, "a cat"))
    latents = denoise_latents(scheduler, velocity, noise, 30, lambda: steps.append(1))
    assert (latents - image).abs().max() < 1e-3
    assert image.abs().max() > 3, "clipping would show"
    assert len(steps) == 30


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_step_ends_where_the_next_one_begins(spacing: str) -> None:
    given = DPMSolverMultistepScheduler(timestep_spacing=spacing)

    def apart(scheduler: DDIMScheduler) -> int:
        steps = set_timesteps(scheduler, 50)
        return max(abs(end - int(start)) for (_, end), (start, _) in itertools.pairwise(steps))

    assert apart(sampling_scheduler(given)) == 0
    # The control: DDIM's own steps have one length in every spacing.
    assert apart(DDIMScheduler.from_config(given.config)) == (1 if spacing == "linspace" else 0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 10, 15, 20, 30, 50, 150, 400, 500, 501, 600, 750, 999, 1000])
def test_any_number_of_steps_begins_at_the_end_of_the_schedule_and_ends_at_the_image(spacing: str, steps: int) -> None:
    scheduler = sampling_scheduler(
        PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing=spacing,
            skip_prk_steps=True,
        )
    )
    image = torch.full((1, 4, 1, 2, 2), 3.0)
    seen: list[int] = []

    def noise_in(sample: Tensor, timestep: Tensor) -> Tensor:
        """Of a model that knows the image and the timestep's noise level."""
        seen.append(int(timestep))
        alpha = scheduler.alphas_cumprod[timestep]
        return (sample - alpha.sqrt() * image) / (1 - alpha).sqrt()

    latents = denoise_latents(scheduler, noise_in, torch.randn(image.shape), steps, lambda: None)
    assert len(seen) == steps
    assert 950 <= seen[0] < 1000
    assert seen == sorted(seen, reverse=True)
    torch.testing.assert_close(latents, image, atol=0.2, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero", [False, True])
def test_a_step_is_that_of_diffusers(kind: str, zero: bool) -> None:
    scheduler = sampling_scheduler(DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=zero))
    generator = torch.Generator().manual_seed(0)
    sample, prediction = torch.randn(2, 1, *SHAPE, generator=generator)
    pairs = set_timesteps(scheduler, 30)
    for timestep, following in (pairs[1], pairs[-1]):
        expected = scheduler.step(prediction, timestep, sample).prev_sample
        assert torch.equal(ddim_step(scheduler, prediction, int(timestep), following, sample), expected)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_steps_are_refused(steps: int) -> None:
    scheduler = sampling_scheduler(DDPMScheduler())
    with pytest.raises(MobiusError, match=rf"num_inference_steps={steps}\b.*\b1000\b"):
        denoise_latents(scheduler, lambda sample, timestep: sample, torch.zeros(1, *SHAPE), steps, lambda: None)


def test_guidance() -> None:
    unconditional, conditional = torch.randn(2, 1, *SHAPE).unbind(0)
    assert torch.allclose(guided_prediction(unconditional, conditional, 1.0), conditional, atol=1e-6)
    assert torch.equal(guided_prediction(unconditional, conditional, 0.0), unconditional)
    strong = guided_prediction(unconditional, conditional, 8.0)
    rescaled = guided_prediction(unconditional, conditional, 8.0, rescale=1.0)
    assert strong.std() > 5 * conditional.std()
    assert torch.allclose(rescaled.std(), conditional.std(), rtol=1e-4)


def test_noise_belongs_to_seed_and_prompt() -> None:
    noise = initial_noise(SHAPE, prompt_generator(3, "a cat"))
    assert noise.shape == (1, *SHAPE)
    assert torch.equal(noise, initial_noise(SHAPE, prompt_generator(3, "a cat")))
    for other in (prompt_generator(4, "a cat"), prompt_generator(3, "a dog")):
        assert not torch.equal(noise, initial_noise(SHAPE, other))


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_frames_correlate_as_asked_with_unit_variance(correlation: float) -> None:
    noise = initial_noise((4, 3, 64, 64), prompt_generator(0, "a cat"), correlation)[0]
    assert noise.var().item() == pytest.approx(1, abs=0.05)
    between = torch.corrcoef(noise.transpose(0, 1).flatten(1))
    assert between[0, 1].item() == pytest.approx(correlation, abs=0.05)
    assert between[1, 2].item() == pytest.approx(correlation, abs=0.05)


def test_a_longer_clip_begins_with_the_noise_of_a_shorter_one() -> None:
    still, clip = (initial_noise((4, n, 5, 7), prompt_generator(0, "a cat"), 0.3) for n in (1, 6))
    assert torch.equal(still, clip[:, :, :1])
