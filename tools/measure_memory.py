"""Run real steps of a recipe in several modes and compare the measured with the planned memory.

On a GPU it measures the allocator's peaks, on a CPU the exact bytes saved for the backward pass.
"""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
import json
from pathlib import Path
from typing import Any

from mobius_train.cli import add_engine_options, deepspeed_json, parse_options, run
from mobius_train.config import load
from mobius_train.errors import MobiusError
from mobius_train.files import check_writable
from mobius_train.job.environment import choose_accelerator
from mobius_train.recipe_fields import add_overrides
from mobius_train.shared_files import REPOSITORY

MIB = 2**20


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe (YAML)")
    add_engine_options(parser)
    parser.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE[+recompute][+key=value…]",
        help="variants to measure, each in a separate process (default: the recipe unchanged)",
    )
    parser.add_argument("--warmup", type=int, default=2, help="optimizer steps before measuring (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="measured optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--random-models",
        action="store_true",
        help="use random weights of full size and random clips, without model files or data",
    )
    parser.add_argument("--snapshot", type=Path, metavar="FILE", help="write the allocator's history (one mode, GPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the full report, sizes in bytes")
    add_overrides(parser)
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    if arguments.warmup < 0 or arguments.steps < 1:
        raise MobiusError(f"--warmup {arguments.warmup} --steps {arguments.steps}: they must be at least 0 and 1")
    for path in (arguments.json, arguments.snapshot):
        if path is not None:
            check_writable(path, file=True)
    choose_accelerator()
    # This imports DeepSpeed, which reads the chosen accelerator.
    from mobius_train.measure.side_by_side import Job, failures, measure_apart, overrides_of

    ds_path, given = deepspeed_json(arguments), tuple(arguments.overrides)
    recipe = {load(arguments.config, given).mode: given}
    variants = {one: (*given, *overrides_of(one)) for one in arguments.modes} if arguments.modes else recipe
    for overrides in variants.values():
        load(arguments.config, overrides)
    if arguments.snapshot is not None and len(variants) > 1:
        raise MobiusError("--snapshot supports only one mode: give one to --modes")
    records = {}
    for name, overrides in variants.items():
        job = Job(
            str(arguments.config),
            overrides,
            None if ds_path is None else str(ds_path),
            arguments.warmup,
            arguments.steps,
            arguments.random_models,
            None if arguments.snapshot is None else str(arguments.snapshot),
        )
        records[name] = measure_apart(job)
        if "error" not in records[name]:
            show(name, records[name])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    failed = failures(records)
    if failed:
        raise MobiusError("not measured:\n" + "\n".join(f"  - {line}" for line in failed))


def show(name: str, record: dict[str, Any]) -> None:
    measured = record["measured"]
    fastest, slowest = measured["spread"]
    print(f"{name}, on {measured['device']}: {measured['step_seconds']:.3f} s/step ({fastest:.3f} to {slowest:.3f})")
    print(f"  {'MiB':<44}{'planned':>10}{'measured':>10}{'error':>8}")
    for row in record["rows"]:
        error = "" if row["error"] is None else f"{row['error']:+.1%}"
        print(f"  {row['name']:<44}{_mib(row['planned']):>10}{_mib(row['measured']):>10}{error:>8}")
    for phase, peak in measured["phases"].items():
        print(f"  reserved by the allocator in {phase:<34}{_mib(peak['reserved']):>10}")
    whole = sum(measured["seconds"].values())
    print(f"  {'time by part (watching takes time too)':<44}{'s':>10}")
    for part, seconds in sorted(measured["seconds"].items(), key=lambda item: -item[1]):
        print(f"  {part:<44}{seconds:>10.3f}{seconds / whole:>18.1%}")
    print(f"  resident set of the process, peak {_mib(measured['resident_set']):>30}", flush=True)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:.1f}"


if __name__ == "__main__":
    run(main)
