from __future__ import annotations

import pytest

from mobius_train.evaluate.preference.binomial import half_width, sign_test, wilson_interval


@pytest.mark.parametrize(
    ("wins", "trials", "low", "high"),
    # Method 3 in table I of Newcombe, Statistics in Medicine 17 (1998).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(wins: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(wins, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(trials - wins, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_76_pairs_give_eleven_percent() -> None:
    assert half_width(76) == pytest.approx(0.11, abs=0.001)
    assert half_width(303) == pytest.approx(0.056, abs=0.001)
    assert half_width(40) > half_width(41)


def test_bounds_stay_in_range() -> None:
    for trials in range(1, 200):
        (lowest, low), (high, highest) = wilson_interval(0, trials), wilson_interval(trials, trials)
        assert 0 <= lowest < low < 1
        assert 0 < high < highest <= 1
        assert (lowest, highest) == pytest.approx((0, 1))
    for wins, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="trial"):
            wilson_interval(wins, trials)


def test_the_sign_test_is_the_exact_binomial_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((8, 2), (2, 8), (5, 5), (28, 9), (0, 7), (200, 103), (2000, 2103)):
        assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)
    # 2 · (1 + 10 + 45) / 2^10
    assert sign_test(8, 2) == pytest.approx(0.109375)
    assert sign_test(0, 0) == sign_test(4, 4) == 1
