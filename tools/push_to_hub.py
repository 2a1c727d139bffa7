"""Push a finished model, such as final/ of a run, to a repository on the Hugging Face hub."""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from mobius_train.cli import parse_options, run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the model; all its files are pushed")
    parser.add_argument("--repository", required=True, help="OWNER/NAME; it is made if there is none")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    # Imported after mistakes in the options.
    from mobius_train.hub import check_model, make_repository, push_folder

    check_model(arguments.folder)
    name = make_repository(arguments.repository, private=not arguments.public)
    print(push_folder(arguments.folder, name))


if __name__ == "__main__":
    run(main)
