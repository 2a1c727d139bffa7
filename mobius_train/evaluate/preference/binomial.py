"""Uncertainty of a preference ratio: the Wilson interval and the sign test."""

from __future__ import annotations

from math import comb, sqrt
from statistics import NormalDist

CONFIDENCE = 0.95


def wilson_interval(wins: float, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a ratio, equation 4 of Wilson, JASA 22 (1927), https://doi.org/10.2307/2276774.

    With p = wins / trials, n = trials and z the normal quantile: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    Raises:
        ValueError: there are no trials, or more wins than trials.
    """
    if not 0 <= wins <= trials or trials < 1:
        raise ValueError(f"a ratio needs 0 <= wins <= trials and a trial, got {wins} of {trials}")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    p = wins / trials
    centre = p + z**2 / (2 * trials)
    half = z * sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    # Rounding must not put the bound of 0 or all wins outside of [0, 1].
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def half_width(trials: int) -> float:
    """Half the width of the 95 % Wilson interval around a ratio of 50 %, the widest for this number of trials.

    Raises:
        ValueError: there are no trials.
    """
    low, high = wilson_interval(trials / 2, trials)
    return (high - low) / 2


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p of the hypothesis that wins and losses are equally likely.

    With n = wins + losses: min(1, 2 Σ_{k ≤ min(wins, losses)} C(n, k) / 2ⁿ). It is 1 if n is 0.
    """
    n = wins + losses
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)
