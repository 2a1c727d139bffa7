"""Started by slurm/train.sh in place of mobius_train/main.py: the training command, which waits to be interrupted.

    paused_training.py <argument> ...

Every start except the last waits after its second step, until it is asked to stop or killed: Slurm takes seconds for
that, in which tiny models would take all their steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from mobius_train.cli import run_rank
from mobius_train.main import main
from mobius_train.trainer import Trainer

LAST_START = 4
PAUSE_AFTER = 2


def pause() -> None:
    """Let rank 0 wait; the others wait for it in the next step."""
    step_of_trainer = Trainer._step
    first_steps: list[int] = []

    def paused(trainer: Trainer, batches: Iterator[Any]) -> dict[str, float]:
        first_steps.append(trainer.progress.step)
        if trainer.distributed.is_main and trainer.progress.step == first_steps[0] + PAUSE_AFTER:
            while not trainer.stop.asked():
                time.sleep(0.05)
        return step_of_trainer(trainer, batches)

    Trainer._step = paused  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1 < LAST_START:
        pause()
    run_rank(main)
