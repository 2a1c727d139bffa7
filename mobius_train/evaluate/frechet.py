"""The Fréchet distance of two sets of clips, with controls that show what it can see.

Legend: N, M clips of the sets, D width of the features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The squared Fréchet distance of two normal distributions (https://arxiv.org/abs/1706.08500).

    |μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½), with the sample covariances Σ = XᵀX of the scaled deviations X. The trace
    of (Σ1 Σ2)^½ is the sum of the singular values of X1 X2ᵀ, or of R1 R2ᵀ with the QR decompositions X = QR, which is
    exact for fewer clips than features too.

    Args:
        first, second: float64 (N, D) and (M, D) with N, M > 1.
    """
    (mean1, deviations1), (mean2, deviations2) = (_moments(features) for features in (first, second))
    root = torch.linalg.matrix_norm(_triangle(deviations1) @ _triangle(deviations2).T, ord="nuc")
    spread = deviations1.square().sum() + deviations2.square().sum() - 2 * root
    # Rounding can make the distance of equal sets negative.
    return max(0.0, float((mean1 - mean2).square().sum() + spread))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def _triangle(deviations: Tensor) -> Tensor:
    return torch.linalg.qr(deviations, mode="r").R


class Controls(NamedTuple):
    """Distances of half of the reference clips to the other half: as they are, and with shuffled frames."""

    halves: float
    shuffled: float


def controls(reference: Tensor, shuffled: Tensor, seed: int = 0) -> Controls:
    """Compare random halves of the reference; both distances are of equally many, and different, clips.

    Args:
        reference, shuffled: (M, D) features of the clips, and of the same clips with shuffled frames, with M > 3.
    """
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    first, second = order.chunk(2)
    return Controls(
        frechet_distance(reference[first], reference[second]), frechet_distance(reference[first], shuffled[second])
    )
