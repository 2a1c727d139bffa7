"""After a run has failed: note it in its folder, and exit 0 if it is worth another try."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobius_train.cli import run
from mobius_train.job.failures import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--exit-code", type=int, required=True)
    parser.add_argument("--job", default="", help="for the record")
    arguments = parser.parse_args()
    step = record(arguments.output_dir, arguments.exit_code, arguments.job)
    print(f"failed after step {step}, for the first time there")


if __name__ == "__main__":
    run(main)
