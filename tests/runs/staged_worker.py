"""Started on several ranks: the training command, which is killed before a step of a stage.

    staged_worker.py <kill> <argument> ...

<kill> is <number of the stage>:<steps done>, or - for none.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from mobius_train.cli import run_rank
from mobius_train.job.distributed import Distributed
from mobius_train.main import main
from mobius_train.stages import train
from mobius_train.trainer import Trainer


def kill_before_a_step(stage: str, step: int) -> None:
    """Let each rank kill itself."""
    step_of_trainer = Trainer._step

    def killed(trainer: Trainer, batches: Iterator[Any]) -> dict[str, float]:
        if trainer.output_dir.name.startswith(f"{stage}-") and trainer.progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of_trainer(trainer, batches)

    Trainer._step = killed  # type: ignore[assignment, method-assign]


def tell_workers_left() -> None:
    """Print after each stage how many of its data workers are left."""
    release = train._release

    def told(distributed: Distributed) -> None:
        release(distributed)
        print(f"workers left: {len(multiprocessing.active_children())}", flush=True)

    train._release = told


if __name__ == "__main__":
    tell_workers_left()
    kill = sys.argv.pop(1)
    if kill != "-":
        stage, _, step = kill.partition(":")
        kill_before_a_step(stage, int(step))
    run_rank(main)
