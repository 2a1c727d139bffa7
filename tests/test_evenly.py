"""Choosing some of many."""

from itertools import pairwise

import pytest

from mobius_train.evenly import evenly


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 100, 127, 128, 1000])
def test_at_most_so_many_and_evenly(count: int) -> None:
    chosen = evenly(range(count), 64)
    assert len(chosen) == min(count, 64)
    assert chosen[:1] == list(range(count))[:1]
    steps = {after - before for before, after in pairwise(chosen)}
    assert not steps or max(steps) - min(steps) <= 1
