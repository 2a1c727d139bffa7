"""One rank on a GPU: prints how often the host waits for the device, in a control and in a step of a recipe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from mobius_train.config import load
from mobius_train.devices import Arriving
from mobius_train.engine.choose import choose_engine
from mobius_train.engine.spread import spread_of
from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import Launch
from mobius_train.tasks.build_task import build_task
from mobius_train.trainer import micro_batch

ALONE = Launch(rank=0, local_rank=0, world_size=1, local_world_size=1)


def host_waits(act: Callable[[], object]) -> int:
    """How often `act` makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def main(path: Path) -> None:
    config = load(path)
    with Distributed(ALONE) as distributed:
        task = build_task(config, distributed)
        engine = choose_engine(config, spread_of("fsdp", None, ALONE))(task.trained, task.units, distributed)
        task.prepare_data()
        batches = task.ahead(task.training_batches(0))

        def step() -> None:
            loss = Arriving(micro_batch(task, engine, next(batches)))
            assert engine.step(1e-3) is not None
            loss.value()

        # Constants are moved to the GPU in the first steps.
        step()
        step()
        print(host_waits(lambda: torch.ones(1, device="cuda").item()), host_waits(step))
        engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
