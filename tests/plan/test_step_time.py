"""The predicted time of a step against numbers worked out by hand."""

from __future__ import annotations

import pytest

from mobius_train.plan.step_time import Interconnect, Workload, step_seconds

# Collectives reach 192 GB/s within a node and 10 GB/s between nodes.
NETWORK = Interconnect(within=240e9, between=12.5e9, gpus_per_node=8, efficiency=0.8)
# A micro-batch takes 0.1 s and a step of two 0.2 s: backward passes take 0.1333 s, the last of them 0.0667 s.
# The parameters have 2 GB: on 16 GPUs each sends 15/16 of it, 1.875 GB (0.1875 s), to gather or to scatter them,
# and 3.75 GB (0.375 s) to all-reduce them.
WORK = Workload(parameters=10**9, flop=10e12, flops=100e12, accumulation=2)


@pytest.mark.parametrize(
    ("stage", "seconds"),
    [
        # 0.2 s, and what the last backward pass does not hide of one all-reduce: 0.375 s - 0.0667 s.
        (0, 0.5083),
        # And an all-gather after the step: 0.1875 s.
        (1, 0.6958),
        # Two all-reduces, 0.75 s, of which both backward passes hide 0.1333 s: 0.2 s + 0.6167 s + 0.1875 s.
        (2, 1.0042),
        # Two all-gathers and two reduce-scatters, 0.75 s, which hide the 0.2 s of computing.
        (3, 0.75),
    ],
)
def test_a_step_on_two_nodes(stage: int, seconds: float) -> None:
    assert step_seconds(WORK, stage, 16, NETWORK) == pytest.approx(seconds, abs=1e-4)


def test_a_fast_link_hides_all_but_the_gathering_after_the_step() -> None:
    # On the 8 GPUs of a node each sends 1.75 GB to gather 2 GB: 0.0091 s at 192 GB/s.
    seconds = [step_seconds(WORK, stage, 8, NETWORK) for stage in range(4)]
    assert seconds == pytest.approx([0.2, 0.2091, 0.2091, 0.2], abs=1e-4)
