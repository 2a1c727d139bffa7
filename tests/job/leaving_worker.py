"""Has data workers, then ends as its argument says."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time

from mobius_train.cli import run_rank
from mobius_train.errors import MobiusError


class Numbers:
    def __init__(self) -> None:
        self.keys = ["a", "b"]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return index

    def read(self, index: int, caption: int, place: object = None) -> int:
        return index


def main() -> None:
    from mobius_train.data.loader import training_batches

    batches = training_batches(
        Numbers(), list, batch_size=1, seed=0, rank=0, world_size=1, samples_seen=0, num_workers=2
    )
    next(batches)
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    how = sys.argv[1]
    if how == "refuse":
        raise MobiusError("of the input")
    if how == "raise":
        raise RuntimeError("of a step")
    if how == "exit":
        sys.exit(3)
    if how == "interrupt":
        # A shell starts what runs in the background with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    if how == "kill a worker":
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        for _ in range(10_000):
            next(batches)


if __name__ == "__main__":
    run_rank(main)
