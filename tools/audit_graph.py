"""Check on real steps of a recipe that the backward pass excludes the frozen spatial branch.

The report lists the bytes that each module saves for the backward pass. The exit code is 1 if the check fails, as it
does for mode=serial.
"""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from mobius_train.cli import add_deepspeed_option, parse_options, run_rank
from mobius_train.config import load
from mobius_train.errors import MobiusError
from mobius_train.job import environment
from mobius_train.recipe_fields import add_overrides
from mobius_train.shared_files import REPOSITORY

SHOWN = 5


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe (YAML)")
    add_deepspeed_option(parser)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--fusion-depth", type=int, help="blocks behind the fusion to claim (default: the model's); a control"
    )
    parser.add_argument("--top", type=int, default=20, help="modules to list, by saved bytes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the full report as JSON, sizes in bytes")
    add_overrides(parser)
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    config = load(arguments.config, arguments.overrides)
    launch = environment.prepare()
    # Heavy imports follow the cheap checks and the environment variables that they read.
    from mobius_train.engine.spread import spread_of
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.job.versions import versions
    from mobius_train.measure.audit import Audit, audit

    quiet_libraries()
    # Output during model loading is not part of the report.
    with redirect_stdout(sys.stderr):
        spread = spread_of("deepspeed", arguments.deepspeed, launch)
        found: Audit = audit(config, spread, arguments.steps, arguments.fusion_depth)
    if launch.rank == 0 and arguments.json:
        report = {
            "proven": found.proven,
            "claims": [{"what": c.what, "proven": c.proven, "offenders": c.offenders} for c in found.claims],
            "saved_bytes": {"total": found.saved.total, "by_module": found.saved.nbytes},
            "saved_tensors": found.saved.tensors,
            "autograd_nodes": found.nodes,
            "config": config.model_dump(mode="json"),
            "versions": versions(),
        }
        print(json.dumps(report, indent=1))
    elif launch.rank == 0:
        for claim in found.claims:
            print(f"{'proven    ' if claim.proven else 'NOT PROVEN'}  {claim.what}")
        print(f"saved for the backward pass of one micro-batch: {found.saved.total / 2**20:.2f} MiB")
        for name, nbytes in list(found.saved.nbytes.items())[: arguments.top]:
            print(f"{nbytes / 2**20:10.2f} MiB  {name}")
        if len(found.saved.nbytes) > arguments.top:
            print(f"and {len(found.saved.nbytes) - arguments.top} more modules (--top)")
    failed = [claim for claim in found.claims if not claim.proven]
    if failed:
        raise MobiusError("\n".join(["not proven:"] + [f"  - {c.what}, but: {_first(c.offenders)}" for c in failed]))


def _first(offenders: tuple[str, ...]) -> str:
    more = f" and {len(offenders) - SHOWN} more" if len(offenders) > SHOWN else ""
    return f"{', '.join(offenders[:SHOWN])}{more}"


if __name__ == "__main__":
    run_rank(main)
