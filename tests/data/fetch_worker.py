"""Started on several ranks by test_remote.py: opens the data of a recipe, as a run does before its first step.

fetch_worker.py <recipe>
"""

from __future__ import annotations

import sys
from pathlib import Path

from mobius_train.assembly.open_data import open_data
from mobius_train.cli import run_rank
from mobius_train.config import load
from mobius_train.job import environment
from mobius_train.job.distributed import Distributed


def main() -> None:
    with Distributed(environment.prepare()) as distributed:
        train, heldout = open_data(load(Path(sys.argv[1])), distributed)
        assert heldout is not None
        print(f"rank {distributed.rank}: {len(train)} and {len(heldout)} clips")


if __name__ == "__main__":
    run_rank(main)
