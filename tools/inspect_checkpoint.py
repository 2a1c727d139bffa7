"""Identify a folder (a checkpoint, a run, a pipeline, motion weights …), list its step and parts, and verify it.

No tensor is loaded and nothing is unpickled. The exit code is 1 if something is damaged, or the kind is unknown.
"""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
import json
from pathlib import Path
from typing import Any

from mobius_train.cli import parse_options, run
from mobius_train.errors import MobiusError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoint, run, model folder or motion weights")
    parser.add_argument("--json", action="store_true", help="print the full report as JSON, including shapes")
    return parser


def show(report: dict[str, Any], indent: str = "") -> None:
    step = "" if report["step"] is None else f", step {report['step']}"
    print(f"{indent}{report['path']}: {report.get('class') or report['kind']}{step}")
    for key in ("engine", "ranks", "global_batch_size", "latest", "note", "model", "base", "text_encoder"):
        if key in report:
            print(f"{indent}  {key}: {report[key]}")
    if "frozen" in report:
        frozen = report["frozen"]
        print(f"{indent}  frozen weights: {frozen['sha256'][:12]}…, from {frozen['source']}")
    for part in report["parts"]:
        count = f", {len(part['tensors'])} tensors" if "tensors" in part else ""
        print(f"{indent}  {part['name']}: {part['bytes'] / 1e6:.3f} MB{count}")
    for folder in report.get("folders", []):
        show(folder, indent + "  ")
    if report["kind"] == "checkpoint":
        print(f"{indent}  {'DAMAGED' if report['problems'] else 'verified: all files are intact'}")


def main() -> None:
    arguments = parse_options(make_parser())
    # This imports torch, which takes seconds.
    from mobius_train.checkpoint.inspect import UNKNOWN, inspect

    report = inspect(arguments.folder)
    if report["kind"] == UNKNOWN:
        # This imports diffusers as well.
        from mobius_train.convert.motion import describe_motion

        report |= describe_motion(arguments.folder)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    if report["kind"] == UNKNOWN:
        raise MobiusError(
            f"{arguments.folder} is of no known kind: give a checkpoint, a run's output_dir, a model folder or motion"
            " weights"
        )
    if report["problems"]:
        raise MobiusError("damaged:\n" + "\n".join(f"  - {problem}" for problem in report["problems"]))


if __name__ == "__main__":
    run(main)
