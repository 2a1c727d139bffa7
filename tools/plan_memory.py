"""Predict the peak memory per rank of a training run and its parts, without a GPU and without allocating a model."""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
import json
from functools import partial
from pathlib import Path

from mobius_train.cli import add_engine_options, deepspeed_json, parse_options, run
from mobius_train.config import load
from mobius_train.errors import MobiusError
from mobius_train.job.environment import choose_accelerator
from mobius_train.recipe_fields import add_overrides
from mobius_train.shared_files import REPOSITORY
from mobius_train.stages.recipe import read_stages


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe (YAML)")
    recipe.add_argument("--stages", type=Path, help="plan each stage of this file (YAML; docs/stages.md)")
    add_engine_options(
        parser,
        ("deepspeed", "fsdp", "ddp"),
        "fsdp uses the recipe's fsdp section; ddp is torch's DDP, for comparison with published figures",
    )
    parser.add_argument("--gpu", help="GPU to check against: V100-16, A100-40, …, or a size in GiB")
    parser.add_argument("--ranks", type=int, default=1, help="number of GPUs (default: %(default)s)")
    parser.add_argument("--ranks-per-node", type=int, help="for fsdp.sharding=hybrid (default: all on one node)")
    parser.add_argument("--json", action="store_true", help="print the full plan as JSON, sizes in bytes")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a stacked bar chart (.png, .svg, .pdf)")
    parser.add_argument(
        "--longest",
        nargs="+",
        metavar="GPU",
        help="print the most frames of a clip that 1, 2, 4 and 8 of each of these GPUs share"
        " (sequence_parallel_size), one clip a micro-batch; with --picture as lines",
    )
    parser.add_argument("--no-search", action="store_true", help="skip the search for limits and for changes")
    add_overrides(parser)
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    choose_accelerator()
    # These import torch and DeepSpeed, which takes seconds, so the arguments are checked first.
    from mobius_train.bars import DELAY, progress
    from mobius_train.engine.ds_config import read_ds_json
    from mobius_train.engine.spread import Spread
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.plan import Planner, find_gpu
    from mobius_train.plan.advice import advise
    from mobius_train.plan.largest import QUANTITIES, largest
    from mobius_train.plan.longest import as_table, longest_clips
    from mobius_train.plan.picture import check_picture, draw, draw_longest
    from mobius_train.plan.plan_text import as_json, as_text

    quiet_libraries()
    if arguments.picture is not None:
        check_picture(arguments.picture)
    gpu = None if arguments.gpu is None else find_gpu(arguments.gpu)
    if arguments.stages is None:
        configs = {arguments.config.stem: load(arguments.config, arguments.overrides)}
    else:
        stages = read_stages(arguments.stages, arguments.overrides)
        configs = {stage.name: stage.config for stage in stages.recipes}
    path = deepspeed_json(arguments)
    ds_json = None if path is None else read_ds_json(path)
    planner = Planner(arguments.stages or arguments.config)
    if arguments.longest:
        kinds = [find_gpu(name) for name in arguments.longest]
        found = {
            name: longest_clips(planner, one, partial(Spread.over, engine=arguments.engine, ds_json=ds_json), kinds)
            for name, one in configs.items()
        }
        headings = {name: "" if arguments.stages is None else f"stage {name}\n" for name in found}
        tables = [headings[name] + as_table(one) for name, one in found.items()]
        print(json.dumps(found, indent=1) if arguments.json else "\n".join(tables))
        if arguments.picture is not None:
            draw_longest(found, arguments.picture)
        return
    spread = Spread.over(arguments.ranks, arguments.engine, ds_json, arguments.ranks_per_node)
    plans, reports = {}, {}
    for name, config in configs.items():
        plan = plans[name] = planner.plan(config, spread, gpu)
        limits, advice = {}, []
        if gpu is not None and not arguments.no_search:
            sought = [one for one in QUANTITIES if one.applies(config)]
            bar = progress(sought, desc="planning the largest sizes", unit="search", delay=DELAY)
            limits = {one.name: largest(planner, config, spread, gpu, one) for one in bar}
            advice = [] if plan.fits else advise(planner, config, spread, gpu)
        if arguments.json:
            reports[name] = as_json(plan, limits, advice)
        else:
            heading = "" if arguments.stages is None else f"stage {name}\n"
            print(heading + as_text(plan, limits, advice))
    if arguments.json:
        print(json.dumps(reports if arguments.stages else reports.popitem()[1], indent=1))
    if arguments.picture is not None:
        draw(plans, arguments.picture)
    if gpu is not None and (too_large := {name: plan for name, plan in plans.items() if not plan.fits}):
        name, plan = max(too_large.items(), key=lambda one: one[1].peak)
        who = "the run" if arguments.stages is None else f"stage {name}"
        raise MobiusError(f"{who} needs {(plan.peak - gpu.bytes) / 2**20:.0f} MiB more than a {gpu.name} has")


if __name__ == "__main__":
    run(main)
