from __future__ import annotations

import pytest

from mobius_train.plan.step_time import Interconnect, Workload, step_seconds
from mobius_train.plan.traffic import Traffic

NETWORK = Interconnect("", gpus_per_node=8, within=100.0, between=10.0, efficiency=1.0)
WORK = Workload(parameters=1, flop=30.0, flops=10.0, accumulation=2)


def test_the_link_between_nodes_counts_from_the_second_node_on() -> None:
    assert [NETWORK.bandwidth(gpus) for gpus in (8, 16)] == [100.0, 10.0]


@pytest.mark.parametrize(
    ("stage", "sent", "seconds"),
    [
        # 6 s of computing, of which 4 s of backward passes, 2 s of them in the last micro-batch.
        (0, Traffic(all_reduce=8.0), 6.0),
        (0, Traffic(all_reduce=32.0), 6.0 + 6.0 - 2.0),
        (2, Traffic(all_reduce=32.0), 6.0 + 6.0 - 4.0),
        (2, Traffic(all_gather=32.0), 6.0 + 3.0),
        (3, Traffic(all_gather=32.0), 6.0),
        (3, Traffic(all_gather=32.0, reduce_scatter=64.0), 9.0),
    ],
)
def test_what_does_not_hide_behind_computing_is_added(stage: int, sent: Traffic, seconds: float) -> None:
    assert step_seconds(WORK, stage, sent, 16, NETWORK) == pytest.approx(seconds)
