"""Compute the latents and text embeddings of a training recipe's clips on all ranks, without training.

Start it with `torchrun --nproc_per_node 8 tools/cache_latents.py --config recipe.yaml`, with `srun python …`, or with
python. In a Slurm array, or with --task, each task processes its share. An interrupted build resumes where it stopped.
Training with the same recipe uses the cache. With data.cache_required=true it fails if the cache does not match.
"""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from mobius_train.cli import parse_options, run_rank
from mobius_train.config import load
from mobius_train.errors import MobiusError
from mobius_train.job import environment
from mobius_train.recipe_fields import add_overrides


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a training recipe with data.cache_dir")
    parser.add_argument(
        "--task", metavar="I/N", help="share I of N to process, from 0 (default: Slurm array, else all)"
    )
    add_overrides(parser)
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    config = load(arguments.config, [*arguments.overrides, "data.cache_required=false"])
    if config.data.cache_dir is None:
        raise MobiusError("the recipe has no data.cache_dir: add data.cache_dir=FOLDER")
    task, tasks = environment.array_task(arguments.task)
    launch = environment.prepare()
    # Heavy imports follow the cheap checks and the environment variables that they read.
    from mobius_train.job.distributed import Distributed
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.tasks.build_task import build_task
    from mobius_train.tasks.denoising import DiffusionTask

    quiet_libraries()
    with Distributed(launch) as distributed:
        model = build_task(config, distributed)
        if not isinstance(model, DiffusionTask):
            raise MobiusError(f"stage {config.stage} has nothing to cache: use a recipe of another stage")
        size = distributed.world_size
        model.fill_cache(task * size + distributed.rank, tasks * size)
        distributed.barrier()
        if distributed.is_main:
            print(f"{config.data.cache_dir}: share {task + 1} of {tasks} of the clips of {arguments.config}")


if __name__ == "__main__":
    run_rank(main)
