"""Draws are a function of (seed, sample index) alone."""

import torch

from mobius_train.diffusion.randomness import draw_numbers

SHAPE = (4, 3, 8, 8)


def test_a_sample_draws_the_same_in_any_batch_and_any_order() -> None:
    together = draw_numbers(1, torch.tensor([5, 6, 7]), SHAPE)
    alone = draw_numbers(1, torch.tensor([7]), SHAPE)
    assert torch.equal(together.noise[2:], alone.noise)
    assert torch.equal(together.timestep[2:], alone.timestep)


def test_seeds_and_samples_differ() -> None:
    base = draw_numbers(1, torch.tensor([5]), SHAPE).noise
    assert not torch.equal(base, draw_numbers(1, torch.tensor([6]), SHAPE).noise)
    assert not torch.equal(base, draw_numbers(2, torch.tensor([5]), SHAPE).noise)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw_numbers(1, torch.arange(4), SHAPE)
    assert torch.equal(before, torch.get_rng_state())


def test_timesteps_are_uniform_and_noise_is_standard_normal() -> None:
    draws = draw_numbers(0, torch.arange(1000), (1, 1, 8, 8))
    assert abs(float(draws.timestep.mean()) - 0.5) < 0.03
    assert abs(float(draws.dropout.mean()) - 0.5) < 0.03
    assert abs(float(draws.noise.mean())) < 0.02
    assert abs(float(draws.noise.std()) - 1) < 0.02
