"""Record a failure in a run's folder, and exit 0 if the run should be retried."""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from mobius_train.cli import parse_options, run
from mobius_train.job.failures import record
from mobius_train.stages.begun import begun_folder


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path, help="the folder of the run, or of all stages")
    parser.add_argument("--exit-code", type=int, required=True, help="exit code of the run")
    parser.add_argument("--job", default="", help="job id to record")
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    folder = begun_folder(arguments.output_dir)
    step = record(folder, arguments.exit_code, arguments.job, arguments.output_dir)
    print(f"first failure after step {step}")


if __name__ == "__main__":
    run(main)
