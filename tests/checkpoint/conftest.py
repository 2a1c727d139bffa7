from __future__ import annotations

import pytest

from mobius_train.job import distributed as ranks
from mobius_train.job.environment import Launch


@pytest.fixture
def alone(process_group: None) -> ranks.Distributed:
    """A job of one rank."""
    return ranks.start(Launch(rank=0, local_rank=0, world_size=1, local_world_size=1))
