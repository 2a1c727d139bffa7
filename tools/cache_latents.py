"""Compute the latents and text embeddings of a training recipe's clips once, over all ranks, without training.

`torchrun --nproc_per_node 8 tools/cache_latents.py --config recipe.yaml`, or `srun python …`; or python alone.
An interrupted build goes on where it stopped. Training with the same recipe reads it; with data.cache_required=true it
refuses any other.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from mobius_train import environment
from mobius_train.cli import run_rank
from mobius_train.config import load
from mobius_train.errors import MobiusError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a training recipe with data.cache_dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    config = load(arguments.config, [*arguments.overrides, "data.cache_required=false"])
    if config.data.cache_dir is None:
        raise MobiusError("nowhere to put the cache: give data.cache_dir=FOLDER")
    launch = environment.prepare()
    # Heavy imports come after the cheap checks, and after the environment that they read is set.
    from mobius_train.engine import distributed as ranks
    from mobius_train.quiet import quiet_libraries
    from mobius_train.tasks.build import build_task

    quiet_libraries()
    with closing(ranks.start(launch)) as distributed:
        build_task(config, distributed).prepare_data()
        if distributed.is_main:
            print(f"{config.data.cache_dir}: train and held-out clips of {arguments.config}")


if __name__ == "__main__":
    run_rank(main)
