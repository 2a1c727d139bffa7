from __future__ import annotations

import pytest

from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import Launch


@pytest.fixture
def alone(process_group: None) -> Distributed:
    """A job of one rank."""
    return Distributed(Launch(rank=0, local_rank=0, world_size=1, local_world_size=1))
