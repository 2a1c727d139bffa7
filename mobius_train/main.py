"""The training entry: `deepspeed mobius_train/main.py --deepspeed ds_configs/zero2.json [key=value …]`.

`torchrun` and `srun` start the same file, and plain `python` trains on one process.
"""

from __future__ import annotations

import os
import sys

# Started as a script, Python puts this folder first on the path, where its modules would shadow others.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import argparse
from pathlib import Path

from mobius_train.cli import REPOSITORY, add_engine_options, deepspeed_json, run_rank
from mobius_train.config import load
from mobius_train.job import environment


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mobius_train/main.py", description="Train a text-to-image or text-to-video diffusion model."
    )
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe (YAML)")
    add_engine_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, run one micro-batch, write nothing")
    parser.add_argument("--preflight", action="store_true", help="check the nodes against each other, train nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # old launchers pass it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    # Overrides may stand before, between and after the options.
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    ds_path = deepspeed_json(arguments)
    config = load(arguments.config, arguments.overrides)
    launch = environment.prepare()
    # Heavy imports come after the cheap checks, and after the environment that they read is set.
    from mobius_train.engine.spread import spread_of
    from mobius_train.run import check_nodes, dry_run, train

    act = check_nodes if arguments.preflight else dry_run if arguments.dry_run else train
    act(config, spread_of(arguments.engine, ds_path, launch))


if __name__ == "__main__":
    run_rank(main)
