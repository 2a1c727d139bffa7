"""Convert folders, lists, archives or shards of images and videos to webdataset shards for training, by a recipe.

After an interruption, start it again to continue. In a Slurm array, or with --task, each task processes its own share
first, and then the unfinished parts of other shares.
"""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from mobius_train.cli import parse_options, run
from mobius_train.errors import MobiusError
from mobius_train.job.environment import array_task
from mobius_train.recipe_files import load_as


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a data recipe, such as configs/data/emoji.yaml")
    parser.add_argument("--workers", type=int, default=1, help="number of processes (default: 1)")
    parser.add_argument("--task", metavar="I/N", help="start with share I of N, from 0 (default: the Slurm array's)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override, such as output_dir=data/mine")
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    if arguments.workers < 1:
        raise MobiusError(f"--workers {arguments.workers} must be at least 1")
    share = array_task(arguments.task)
    # These import torch, which takes seconds.
    from mobius_train.prepare.preparation import Share, prepare_data
    from mobius_train.prepare.recipe import PrepareConfig

    config = load_as(PrepareConfig, arguments.config, arguments.overrides)
    prepare_data(config, arguments.workers, Share(*share))
    print((config.output_dir / "report" / "report.md").read_text(encoding="utf-8").partition("\n## ")[0])
    print(f"\n{config.output_dir}: shards, index.jsonl and report/")


if __name__ == "__main__":
    run(main)
