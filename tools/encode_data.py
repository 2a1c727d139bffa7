"""Fill a recipe's cache of latents and text embeddings before training, in as many parts side by side as wanted."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobius_train import environment
from mobius_train.cli import run
from mobius_train.config import load
from mobius_train.errors import MobiusError
from mobius_train.quiet import quiet_libraries


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the recipe (YAML) of the training")
    parser.add_argument("--part", type=int, default=0, help="which one, from 0 (default: %(default)s)")
    parser.add_argument("--parts", type=int, default=1, help="of how many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    if not 0 <= arguments.part < arguments.parts:
        raise MobiusError(f"--part {arguments.part} --parts {arguments.parts}: parts are numbered from 0")
    config = load(arguments.config, arguments.overrides)
    launch = environment.prepare()
    quiet_libraries()
    from mobius_train.engine import distributed as ranks
    from mobius_train.tasks.build import build_task
    from mobius_train.tasks.diffusion import DiffusionTask

    with ranks.start(launch) as distributed:
        task = build_task(config, distributed)
        if not isinstance(task, DiffusionTask):
            raise MobiusError(f"stage {config.stage} caches nothing")
        folders = task.fill_cache(arguments.part, arguments.parts)
    print(f"part {arguments.part} of {arguments.parts}: {', '.join(map(str, folders.values()))}")


if __name__ == "__main__":
    run(main)
