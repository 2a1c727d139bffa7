"""From folders, lists, archives or shards of pictures and videos to webdataset shards for training, as a recipe says.

Start it again after an interruption, and it goes on. In a Slurm array (or with --task) each task does its share.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mobius_train.cli import run
from mobius_train.config import load_as
from mobius_train.environment import array_task
from mobius_train.prepare.recipe import PrepareConfig
from mobius_train.prepare.run import Task, prepare


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a data recipe, such as configs/data/emoji.yaml")
    parser.add_argument("--workers", type=int, default=1, help="processes of this task (default: 1)")
    parser.add_argument("--task", metavar="I/N", help="do share I of N, from 0 (default: the Slurm array's, or all)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as output_dir=data/mine")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    config = load_as(PrepareConfig, arguments.config, arguments.overrides)
    index, of = array_task(arguments.task)
    if prepare(config, max(1, arguments.workers), Task(index, of)):
        print((config.output_dir / "report" / "report.md").read_text(encoding="utf-8").partition("\n## ")[0])
        print(f"\n{config.output_dir}: shards, index.jsonl and report/")
    else:
        print(f"task {index} of {of} has done what it can: parts of others are missing; start all again after them")


if __name__ == "__main__":
    run(main)
