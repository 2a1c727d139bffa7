"""Flip single bits and cut files of a run's checkpoint, its latent cache and its shards, and count what is not noticed.

    python benchmarks/damage.py runs/emoji --record benchmarks/damage.json

RUN is the folder of a run whose recipe has shards with an index.json and data.cache_dir. Each damage is made on a copy,
checked by the functions that a start calls, and undone. Bits and lengths are spread evenly over each file; with
--flips 0 every bit is flipped. A control checks the undamaged copy before and after. Exits 1 if a damage is silent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from mobius_train.checkpoint.folders import checkpoints
from mobius_train.checkpoint.verify import problems
from mobius_train.cli import run
from mobius_train.config import load
from mobius_train.data import cache
from mobius_train.data.clips import open_clips
from mobius_train.data.patterns import local_paths
from mobius_train.errors import MobiusError
from mobius_train.job.versions import versions

# The reason for which a file is refused; empty if it is not.
Check = Callable[[], str]


@dataclass
class Counted:
    """The damages of one file: how many were made, refused, and silent."""

    bytes: int
    made: int = 0
    refused: int = 0
    silent: int = 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--flips", type=int, default=1000, help="of each file; 0: every bit")
    parser.add_argument("--cuts", type=int, default=200, help="of each file; 0: every length")
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write")
    return parser.parse_args()


def _spread(total: int, count: int) -> Iterator[int]:
    """`count` numbers below `total`, or all."""
    count = total if not count else min(count, total)
    return (number * total // count for number in range(count))


def _damages(path: Path, flips: int, cuts: int) -> Iterator[None]:
    """Damage the file, yield, and undo the damage, once for each bit and length."""
    content = path.read_bytes()
    for bit in _spread(8 * len(content), flips):
        place = bit // 8
        with path.open("r+b", buffering=0) as file:
            for byte in (content[place] ^ 1 << bit % 8, content[place]):
                file.seek(place)
                file.write(bytes([byte]))
                if byte != content[place]:
                    yield
    for length in _spread(len(content), cuts):
        os.truncate(path, length)
        yield
        with path.open("r+b") as file:
            file.seek(length)
            file.write(content[length:])


def _refusal(check: Callable[[], object]) -> str:
    try:
        check()
    except MobiusError as error:
        return str(error)
    return ""


def _checkpoint(folder: Path) -> dict[Path, Check]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return dict.fromkeys(files, lambda: "\n".join(problems(folder)))


def _cache(folder: Path) -> dict[Path, Check]:
    identity = json.loads((folder / cache.IDENTITY).read_text())
    keys = json.loads((folder / cache.KEYS).read_text())

    def check() -> str:
        damaged = cache.check_parts(folder, keys, identity)
        return "\n".join(f"{cache.part_path(folder, number)}: {problem}" for number, problem in damaged.items())

    return dict.fromkeys(sorted(folder.glob("part-*")), check)


def _shard(path: Path) -> dict[Path, Check]:
    return {path: lambda: _refusal(lambda: open_clips([path], num_frames=1, resolution=8))}


def count(files: dict[Path, Check], flips: int, cuts: int) -> dict[str, Counted]:
    """Damage each file in turn.

    Args:
        files: how each file is checked.

    Raises:
        MobiusError: an undamaged file is refused, so the counts would mean nothing.
    """
    results = {}
    for path, check in files.items():
        if problem := check():
            raise MobiusError(f"the undamaged copy is refused: {problem}")
        counted = Counted(path.stat().st_size)
        for _ in tqdm(_damages(path, flips, cuts), path.name, leave=False, mininterval=5):
            counted.made += 1
            if check():
                counted.refused += 1
            else:
                counted.silent += 1
        if problem := check():
            raise MobiusError(f"the restored copy is refused: {problem}")
        results[path.name] = counted
        print(f"{path.name}: {counted}", flush=True)
    return results


def main() -> None:
    arguments = parse()
    config = load(arguments.run / "config.yaml", [])
    saved = checkpoints(arguments.run)
    if not saved or config.data.cache_dir is None:
        raise MobiusError(f"{arguments.run} has no checkpoint, or its recipe no data.cache_dir")
    caches = sorted(config.data.cache_dir.glob("train-*"), key=os.path.getmtime)
    shard = local_paths(config.data.train[0].path)[0]
    results: dict[str, dict[str, Counted]] = {}
    with tempfile.TemporaryDirectory(prefix="damage-") as temporary:
        copy = Path(temporary)
        shutil.copytree(saved[-1], copy / saved[-1].name)
        shutil.copytree(caches[-1], copy / caches[-1].name)
        for name in (shard.name, "index.json"):
            shutil.copy(shard.with_name(name), copy / name)
        for kind, files in {
            "checkpoint": _checkpoint(copy / saved[-1].name),
            "cache": _cache(copy / caches[-1].name),
            "shard": _shard(copy / shard.name),
        }.items():
            results[kind] = count(files, arguments.flips, arguments.cuts)
    every = [counted for files in results.values() for counted in files.values()]
    totals = {name: sum(getattr(counted, name) for counted in every) for name in ("made", "refused", "silent")}
    record = {
        "what": "single flipped bits and cut files",
        "results": totals,
        "files": {kind: {name: asdict(c) for name, c in files.items()} for kind, files in results.items()},
        "flips_of_each_file": arguments.flips,
        "cuts_of_each_file": arguments.cuts,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": versions(),
    }
    arguments.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(totals, indent=1))
    if totals["silent"]:
        raise MobiusError(f"{totals['silent']} damages are silent; the record lists their files")


if __name__ == "__main__":
    run(main)
