"""Throughput of the loader alone: clips/s and clips/s per core on a recipe's data, decoded and from the latent cache.

    python benchmarks/loader.py --record benchmarks/loader.json

Clips/s per core is relative to the processor time of the loader and its workers; clips/s is relative to wall time. Both
are the best of several repetitions, because other load on a machine only lowers them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from mobius_train.cli import run_rank
from mobius_train.config import RunConfig, load
from mobius_train.job import environment
from mobius_train.shared_files import REPOSITORY

WORKERS = (0, 1, 2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml")
    parser.add_argument("--batches", type=int, default=300, help="of the recipe's train_batch_size")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--record", type=Path, help="where to write the figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    return parser.parse_intermixed_args()


def measure(task: Any, config: RunConfig, workers: int, batches: int) -> dict[str, float]:
    """Clips/s of wall time after the workers have started, and of their whole processor time."""
    data = config.data.model_copy(update={"dataloader_num_workers": workers})
    task.config = config.model_copy(update={"data": data})
    processor = _processor_time()
    stream = task.training_batches(0)
    next(stream)
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - started
    # The processor time of workers is known after they have ended.
    del stream
    clips = batches * config.train_batch_size
    return {
        "clips_per_second": round(clips / seconds, 1),
        "clips_per_second_per_core": round(clips / (_processor_time() - processor), 1),
    }


def _processor_time() -> float:
    """Processor seconds of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    arguments = parse()
    config = load(arguments.config, arguments.overrides)
    launch = environment.prepare()
    # Import these after setting the environment that they read.
    from mobius_train.job.distributed import Distributed
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.tasks.build_task import build_task

    quiet_libraries()
    with Distributed(launch) as distributed:
        task = build_task(config, distributed)
        results: dict[str, dict[str, dict[str, float]]] = {}
        for name in ("decoded", "cached"):
            if name == "cached":
                task.prepare_data()
            results[name] = {}
            for workers in WORKERS:
                repeated = [measure(task, config, workers, arguments.batches) for _ in range(arguments.repetitions)]
                found = {what: max(one[what] for one in repeated) for what in repeated[0]}
                results[name][f"{workers} workers"] = found
                print(f"{name}, {workers} workers: {found}", flush=True)
    record = {
        "recipe": str(arguments.config.name),
        "data": config.data.model_dump(mode="json"),
        "train_batch_size": config.train_batch_size,
        "batches": arguments.batches,
        "repetitions": arguments.repetitions,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_at_the_end": os.getloadavg()[0],
        "results": results,
    }
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_rank(main)
