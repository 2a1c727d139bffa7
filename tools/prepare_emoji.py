"""Turn the Fluent Emoji animations into webdataset shards, with a train and a held-out split."""

from __future__ import annotations

import argparse
from pathlib import Path

from mobius_train.cli import run
from mobius_train.prepare.emoji import names as emoji
from mobius_train.prepare.emoji.shards import Options, prepare

CACHE = Path.home() / ".cache" / "mobius-train" / "fluent-emoji"


def parse() -> argparse.Namespace:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--packages",
        nargs="+",
        type=Path,
        metavar="DIR_OR_TGZ",
        help=f"the packages {', '.join(emoji.PACKAGES)} of {emoji.VERSION}; default: fetch them with npm",
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where fetched packages are kept (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="its folders are named by resolution")
    parser.add_argument(
        "--resolution", type=int, nargs="+", default=list(defaults.resolutions), help="pixels (default: 64)"
    )
    parser.add_argument(
        "--num-frames", type=int, default=defaults.num_frames, help="of each clip, over its loop (default: 8)"
    )
    parser.add_argument("--subset", choices=emoji.SUBSETS, default=defaults.subset, help="base: no skin-tone variants")
    parser.add_argument(
        "--heldout",
        type=int,
        default=defaults.heldout,
        help="emoji held out, with all variants (default: 64)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the split (default: 0)")
    parser.add_argument("--processes", type=int, default=defaults.processes, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the output's folders of these resolutions")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    options = Options(
        resolutions=tuple(dict.fromkeys(arguments.resolution)),
        num_frames=arguments.num_frames,
        subset=arguments.subset,
        heldout=arguments.heldout,
        seed=arguments.seed,
        processes=arguments.processes,
    )
    packages = arguments.packages or emoji.fetch(arguments.cache)
    indices = prepare(packages, arguments.output, options, arguments.overwrite)
    for resolution, index in indices.items():
        size = sum(shard["bytes"] for shard in index["shards"].values())
        print(
            f"{arguments.output / str(resolution)}: {len(index['shards'])} shards, {size / 1e6:.1f} MB,"
            f" {index['counts']}"
        )
    for name, problem in index["unreadable"].items():
        print(f"unreadable: {name}: {problem}")
    for name in index["unnamed"]:
        print(f"unnamed: {name}")


if __name__ == "__main__":
    run(main)
