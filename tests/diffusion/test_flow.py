"""Flow matching against its equations, and in runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from recipes import Run, losses
from torch import Tensor

from mobius_train.config_sections import ObjectiveConfig
from mobius_train.diffusion.build_process import build_process
from mobius_train.diffusion.ddpm import DdpmProcess
from mobius_train.diffusion.flow import FlowProcess
from mobius_train.diffusion.randomness import Draws, draw_numbers
from mobius_train.diffusion.sampler import denoise_latents, sampling_scheduler
from mobius_train.errors import MobiusError
from mobius_train.pipeline import TextToVideoPipeline

SHAPE = (4, 3, 8, 8)


def process(shift: float = 1.0, **config: object) -> FlowProcess:
    made = build_process(FlowMatchEulerDiscreteScheduler(shift=shift), ObjectiveConfig(**config))
    assert isinstance(made, FlowProcess)
    return made


def at(draws: Draws, *positions: float) -> Draws:
    """The same draws, at these positions of the schedule."""
    return replace(draws, timestep=torch.tensor(positions, dtype=draws.timestep.dtype))


def test_the_noisy_sample_and_the_target_follow_the_equations() -> None:
    draws, latents = draw_numbers(0, torch.arange(3), SHAPE), torch.randn(3, *SHAPE)
    noisy = process().noisy(latents, at(draws, 0.0, 0.25, 0.9))
    sigmas = torch.tensor([0.0, 0.25, 0.9])
    torch.testing.assert_close(noisy.timesteps, 1000 * sigmas)
    mixed = sigmas.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy.sample, (1 - mixed) * latents + mixed * draws.noise)
    torch.testing.assert_close(noisy.target, draws.noise - latents)
    assert torch.equal(noisy.weight, torch.ones(3))
    # From any point of the line, the target leads to both ends.
    torch.testing.assert_close(noisy.sample - mixed * noisy.target, latents)


@pytest.mark.parametrize("of_scheduler", [True, False])
def test_the_shift_is_that_of_the_sampler(of_scheduler: bool) -> None:
    own = process(shift=3.0) if of_scheduler else process(flow_shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    positions = torch.arange(1, 1001) / 1000
    draws = draw_numbers(0, torch.arange(1000), (1, 1, 1, 1))
    timesteps = own.noisy(torch.zeros(1000, 1, 1, 1, 1), at(draws, *positions.tolist())).timesteps
    torch.testing.assert_close(timesteps, scheduler.timesteps.flip(0).float(), rtol=1e-5, atol=1e-3)
    assert own.scheduler.config.shift == 3.0


def test_a_quantile_is_the_position_before_the_shift() -> None:
    draws = draw_numbers(0, torch.arange(2), SHAPE)
    assert process(3.0).noisy(torch.zeros(2, *SHAPE), draws, 0.5).timesteps.tolist() == [750.0, 750.0]


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_a_perfect_model_samples_the_data_exactly(steps: int) -> None:
    data, noise = torch.randn(1, *SHAPE), torch.randn(1, *SHAPE)
    begun: list[float] = []

    def perfect(sample: Tensor, timestep: Tensor) -> Tensor:
        begun.append(float(timestep))
        # On the line from the data to this noise the velocity is the same everywhere.
        return noise - data

    sampled = denoise_latents(sampling_scheduler(process(3.0).scheduler), perfect, noise, steps, lambda: None)
    torch.testing.assert_close(sampled, data, rtol=1e-4, atol=1e-4)
    assert len(begun) == steps
    assert begun[0] == pytest.approx(1000)


def test_the_scheduler_chooses_the_process() -> None:
    assert isinstance(build_process(DDPMScheduler(), ObjectiveConfig()), DdpmProcess)
    with pytest.raises(MobiusError, match=r"flow_shift=3.*DDPMScheduler"):
        build_process(DDPMScheduler(), ObjectiveConfig(flow_shift=3))
    for field in ({"prediction_type": "epsilon"}, {"snr_gamma": 5.0}, {"rescale_betas_zero_snr": True}):
        with pytest.raises(MobiusError, match=rf"objective\.{next(iter(field))}.*flow matching"):
            process(**field)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(MobiusError, match="flow_shift"):
        build_process(dynamic, ObjectiveConfig())
    assert build_process(dynamic, ObjectiveConfig(flow_shift=2)).scheduler.config.shift == 2


@pytest.mark.slow
def test_a_run_trains_samples_and_goes_on(run: Run) -> None:
    options: dict[str, Any] = {
        "scheduler_config": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0},
        "objective": {"timestep_sampling": "logit_normal"},
        "max_train_steps": 2,
    }
    whole = run("whole", **options)
    assert (whole / "samples" / "step-2" / "00-dog-number-3.gif").is_file()
    index = json.loads((whole / "final" / "model_index.json").read_text())
    assert index["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"
    pipeline = TextToVideoPipeline.from_pretrained(whole / "final")
    assert pipeline.scheduler.config.shift == 2.0

    # A run starts from this model with its scheduler.
    del options["scheduler_config"]
    options |= {"max_train_steps": 1, "validation": {"prompts": []}}
    going_on = run("going-on", pretrained_model_name_or_path=str(whole / "final"), **options)
    assert losses(going_on)[0] != losses(whole)[0]
    for field in ({"snr_gamma": 5.0}, {"prediction_type": "epsilon"}):
        with pytest.raises(MobiusError, match="flow matching"):
            run(f"refused-{next(iter(field))}", pretrained_model_name_or_path=str(whole / "final"), objective=field)
