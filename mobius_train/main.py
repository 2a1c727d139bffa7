"""The training entry point: `deepspeed mobius_train/main.py --deepspeed ds_configs/zero2.json [key=value …]`.

`torchrun` and `srun` start the same file. Plain `python` trains in one process.
"""

from __future__ import annotations

import os
import sys

# When this file runs as a script, Python puts its folder first on the path, where its modules shadow others.
_HERE = os.path.dirname(os.path.realpath(__file__))
if sys.path and os.path.realpath(sys.path[0]) == _HERE:
    sys.path[0] = os.path.join(os.path.dirname(_HERE), "tools")
    import _environment  # noqa: F401

    del sys.path[0]

import mobius_train.installation  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from mobius_train.cli import add_engine_options, deepspeed_json, parse_options, run_rank
from mobius_train.config import RunConfig, load
from mobius_train.job import environment
from mobius_train.job.stop import Stop
from mobius_train.recipe_fields import add_overrides, as_page, as_schema, as_text
from mobius_train.shared_files import REPOSITORY
from mobius_train.stages.recipe import Stages, read_stages

FIELDS = {"text": as_text, "markdown": lambda: as_page().rstrip()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mobius_train/main.py", description="Train a text-to-image or text-to-video diffusion model."
    )
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe (YAML)")
    recipe.add_argument("--stages", type=Path, help="train in the stages of this file (YAML; docs/stages.md)")
    add_engine_options(parser)
    parser.add_argument(
        "--fields",
        nargs="?",
        choices=FIELDS,
        const="text",
        help="print all fields of a recipe with type, default and meaning; as text (default), or as docs/ has them",
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a recipe, for editors")
    parser.add_argument("--dry-run", action="store_true", help="check all settings, run one micro-batch, write nothing")
    parser.add_argument("--preflight", action="store_true", help="compare and test the nodes without training")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="push final/ to the hub: hub_model_id=OWNER/NAME")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by old launchers
    add_overrides(parser)
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    if arguments.push_to_hub is not None:
        arguments.overrides.append(f"hub_model_id={arguments.push_to_hub}")
    if arguments.fields or arguments.schema:
        print(FIELDS[arguments.fields]() if arguments.fields else as_schema())
        return
    ds_path = deepspeed_json(arguments)
    config: RunConfig | Stages
    if arguments.stages is None:
        config = load(arguments.config, arguments.overrides)
    else:
        config = read_stages(arguments.stages, arguments.overrides)
    # A request to stop ends the imports, too, which take long from a shared file server.
    with Stop().listening():
        launch = environment.prepare()
        # Heavy imports follow the cheap checks and the environment variables that they read.
        from mobius_train.engine.spread import spread_of

        spread = spread_of(arguments.engine, ds_path, launch)
        which = 0 if arguments.preflight else 1 if arguments.dry_run else 2
        if isinstance(config, RunConfig):
            from mobius_train.run import check_nodes, dry_run, train

            (check_nodes, dry_run, train)[which](config, spread)
        else:
            from mobius_train.stages.train import check_nodes_of_stages, dry_run_stages, train_stages

            (check_nodes_of_stages, dry_run_stages, train_stages)[which](config, spread)


if __name__ == "__main__":
    run_rank(main)
