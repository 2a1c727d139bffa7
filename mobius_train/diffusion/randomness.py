"""All random numbers of a training sample, as a function of (seed, global sample index).

The global sample index depends on the rank and the samples seen. A run therefore resumes exactly without saved random
states, and a global batch gets the same noise on one rank or on four. Numbers are drawn on the CPU, whose generator is
bit-identical on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Legend: B clips, C latent channels, F frames, h, w latent size.

    posterior, noise: (B, C, F, h, w), standard normal; offset: (B, C, 1, 1, 1), standard normal;
    shared: (B, C, 1, h, w), standard normal; timestep, dropout: (B,), uniform in [0, 1).
    """

    posterior: Tensor
    noise: Tensor
    shared: Tensor
    offset: Tensor
    timestep: Tensor
    dropout: Tensor

    def correlated_noise(self, correlation: float, offset: float) -> Tensor:
        """Noise (B, C, F, h, w) correlated between a clip's frames, plus `offset` times a constant per channel."""
        return correlate_frames(self.noise, self.shared, correlation) + offset * self.offset


def correlate_frames(noise: Tensor, shared: Tensor, correlation: float) -> Tensor:
    """√ρ · shared + √(1 - ρ) · noise: unit variance, correlation ρ between a clip's frames (arXiv 2305.10474)."""
    if correlation == 0:
        return noise
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * noise


def sample_generator(seed: int, sample_index: int) -> torch.Generator:
    """A separate CPU generator for one sample."""
    # Two odd constants spread neighbouring seeds and indices over the generator's 64 bits.
    mixed = (seed * 0x9E3779B97F4A7C15 + sample_index * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % 2**64
    return torch.Generator().manual_seed(mixed - 2**63)


def draw_numbers(seed: int, sample_indices: Tensor, shape: Sequence[int]) -> Draws:
    """Draw the random numbers of samples with latent shape (C, F, h, w)."""
    channels, _, height, width = shape
    rows = []
    for sample_index in sample_indices.tolist():
        generator = sample_generator(seed, sample_index)
        timestep, dropout = torch.rand(2, generator=generator)
        rows.append(
            (
                torch.randn(*shape, generator=generator),
                torch.randn(*shape, generator=generator),
                torch.randn(channels, 1, height, width, generator=generator),
                torch.randn(channels, 1, 1, 1, generator=generator),
                timestep,
                dropout,
            )
        )
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))
