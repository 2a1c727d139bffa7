"""Convert models and checkpoints; each command checks what it wrote and reports all that it did not carry over."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobius_train.cli import run
from mobius_train.convert.consolidate import DTYPES, MODEL, consolidate
from mobius_train.convert.report import Report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("consolidate", help="a DeepSpeed ZeRO or FSDP checkpoint → one safetensors file")
    command.add_argument("source", type=Path, help="the checkpoint's folder")
    command.add_argument("output", type=Path, help="NAME.safetensors")
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: %(default)s")
    command.add_argument("--weights", default=MODEL, help="entry of the checkpoint (default: %(default)s)")
    command.add_argument("--tag", help="of a DeepSpeed folder with several (default: what its file latest says)")
    command.add_argument("--max-shard-size", default="5GB", help="of one file (default: %(default)s)")
    return parser.parse_args()


def convert(arguments: argparse.Namespace) -> Report:
    source, output = arguments.source, arguments.output
    return consolidate(
        source, output, DTYPES[arguments.dtype], arguments.weights, arguments.tag, arguments.max_shard_size
    )


def main() -> None:
    print("\n".join(convert(parse()).lines()))


if __name__ == "__main__":
    run(main)
