"""Compare two models by the preference of people: make a blind page of paired clips, and tally the votes."""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
import json
import secrets
from pathlib import Path

from mobius_train.cli import parse_options, run
from mobius_train.evaluate.preference.binomial import half_width
from mobius_train.evaluate.preference.key import read_key
from mobius_train.evaluate.preference.tally import Preference, Tally, tally_votes
from mobius_train.files import check_writable


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("page", help="two folders of tools/sample.py → a page for voters, and its key")
    command.add_argument("first", type=Path, help="clips of the first model")
    command.add_argument("second", type=Path, help="clips of the second model, of the same prompts")
    command.add_argument("--page", type=Path, required=True, help="HTML file to write, for the voters")
    command.add_argument("--key", type=Path, required=True, help="JSON file to write; keep it from the voters")
    command.add_argument("--seed", type=int, help="of the order and the sides (default: random, kept in the key)")
    command.add_argument("--fps", type=float, default=8.0, help="frame rate of all clips (default: %(default)s)")

    command = commands.add_parser("tally", help="the key and the voters' files → counts, ratios and intervals")
    command.add_argument("key", type=Path, help="the key of the page")
    command.add_argument("votes", type=Path, nargs="+", help="files that the voters exported from the page")
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def make_page(arguments: argparse.Namespace) -> None:
    for path in (arguments.page, arguments.key):
        check_writable(path, file=True)
    # These import torch, which takes seconds.
    from mobius_train.evaluate.preference.page import write_page
    from mobius_train.evaluate.preference.pairs import pair_clips

    pairs = pair_clips(arguments.first, arguments.second)
    written = write_page(
        pairs,
        str(arguments.first),
        str(arguments.second),
        page=arguments.page,
        key=arguments.key,
        seed=secrets.randbits(64) if arguments.seed is None else arguments.seed,
        fps=arguments.fps,
    )
    shape, suffix = written.shape, pairs[0].first.suffix.lower()
    print(f"{arguments.page}: {len(pairs)} pairs, {arguments.page.stat().st_size / 1e6:.1f} MB")
    print(f"  clips from {suffix}: {shape.num_frames} frames of {shape.width}x{shape.height} at {arguments.fps:g} fps")
    print(f"  {written.resized} of {2 * len(pairs)} files had another size")
    print(f"  precision of one voter's ratio: 50% ± {half_width(len(pairs)):.1%}")
    print(f"{arguments.key}: which model is on which side; keep it from the voters")


def show_tally(tally: Tally) -> None:
    sides = tally.key.sides
    print(f"first: {sides.first}\nsecond: {sides.second}")
    for voter, count in tally.voters.items():
        print(f"voter {voter}: {count} of {len(sides.pairs)} pairs")
    for question, votes in tally.votes.items():
        print(f"{question}\n  votes: {_line(votes)}")
        if len(tally.voters) > 1:
            print(f"  pairs: {_line(tally.pairs[question])}")
    if len(tally.voters) > 1:
        print("votes on one pair are not independent: the interval of the pairs is the safe one")


def _line(preference: Preference) -> str:
    values = preference.as_json()
    counts = f"first {preference.first}, second {preference.second}, no difference {preference.no_difference}"
    if values["ratio"] is None:
        return f"{counts}; no ratio, since nothing is decided"
    low, high = values["wilson_95"]
    return (
        f"{counts}; first {values['ratio']:.1%}, 95% {low:.1%} to {high:.1%}; sign test p = {values['sign_test_p']:.2g}"
    )


def main() -> None:
    arguments = parse_options(make_parser(), commands=True)
    if arguments.command == "page":
        make_page(arguments)
        return
    tally = tally_votes(read_key(arguments.key), arguments.votes)
    if arguments.json:
        print(json.dumps(tally.as_json(), indent=1, ensure_ascii=False))
    else:
        show_tally(tally)


if __name__ == "__main__":
    run(main)
