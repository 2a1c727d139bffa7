"""Prepare a data set with one worker, with two, and with two under SIGKILLs at random times, and compare all three.

    python benchmarks/prepare_kills.py --config configs/data/emoji.yaml --kills 10 --record prepare_emoji.json

Each kill hits the tool's process group: the tool and its workers. Shards and index must be identical byte for byte,
and the folder must contain nothing else. A control shows that the comparison detects one changed byte and one lost row.
Exits 1 on any deviation.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mobius_train.cli import run
from mobius_train.errors import MobiusError
from mobius_train.files import TEMPORARY
from mobius_train.job.versions import versions
from mobius_train.prepare.listing import OFFSETS
from mobius_train.prepare.passes import passes
from mobius_train.prepare.recipe import PrepareConfig
from mobius_train.recipe_files import load_as
from mobius_train.shared_files import REPOSITORY

PACKAGES = ("av", "pillow", "opencv-python-headless", "scenedetect-headless", "rapidocr", "onnxruntime", "webdataset")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "data" / "emoji.yaml")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    return parser.parse_args()


def start(arguments: argparse.Namespace, output: Path, workers: int) -> subprocess.Popen[bytes]:
    """Start the tool in its own session, so that no process survives a kill."""
    tool = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py"), "--config", str(arguments.config)]
    command = [*tool, "--workers", str(workers), *arguments.overrides, f"output_dir={output}"]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen[bytes], output: Path) -> float:
    """Wait for the end of a start; returns its processor seconds, including workers."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        log = output.with_suffix(".log").read_text(encoding="utf-8")
        raise MobiusError(f"the preparation failed (exit code {process.returncode}):\n{log[-3000:]}")
    return round(usage.ru_utime + usage.ru_stime, 1)


def killed(arguments: argparse.Namespace, output: Path) -> list[dict[str, Any]]:
    """Kill and restart the tool, then let it finish. The first kill may hit the listing, the others any part."""
    chance = random.Random(arguments.seed)
    config = load_as(PrepareConfig, arguments.config, arguments.overrides)
    points = sorted(chance.uniform(0, 0.85) for _ in range(arguments.kills - 1))
    kills: list[dict[str, Any]] = []
    for point in (None, *points):
        process = start(arguments, output, 2)
        try:
            if point is not None:
                _wait_for_share(process, config, output, point)
            waited = chance.uniform(0, 5)
            time.sleep(waited)
            if process.poll() is not None:
                raise MobiusError(f"the run finished after {len(kills)} kills: choose another --seed")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        unfinished = [path.name for path in output.rglob("*") if path.name.startswith(TEMPORARY)]
        share = round(_share_done(config, output), 3)
        kills.append({"share_done": share, "seconds_later": round(waited, 2), "unfinished_files": len(unfinished)})
        print(f"kill {len(kills)}: {kills[-1]}", flush=True)
    finish(start(arguments, output, 2), output)
    return kills


def _wait_for_share(process: subprocess.Popen[bytes], config: PrepareConfig, output: Path, share: float) -> None:
    while process.poll() is None and _share_done(config, output) < share:
        time.sleep(0.05)


def _share_done(config: PrepareConfig, output: Path) -> float:
    """The finished share of the work."""
    listed = output / "work" / OFFSETS
    if not listed.exists():
        return 0.0
    parts = len(json.loads(listed.read_text(encoding="utf-8"))["offsets"])
    return len(list(output.glob("work/pass-*/part-*.jsonl"))) / (parts * len(passes(config)))


def files(output: Path) -> dict[str, str]:
    """The hash of every file except the report and the recipe, which contains output_dir."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != "recipe.yaml" and not path.is_relative_to(output / "report")
    }


def differing(first: Path, second: Path) -> list[str]:
    """Names of files that are missing in one folder or differ, and the number of differing index rows."""
    ours, theirs = files(first), files(second)
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if "index.jsonl" in names:
        rows = [set((folder / "index.jsonl").read_bytes().splitlines()) for folder in (first, second)]
        names.append(f"{len(rows[0] ^ rows[1])} rows of index.jsonl")
    return names


def control(output: Path, copy: Path) -> bool:
    """Check that one changed byte of a shard and one lost row are detected."""
    shutil.copytree(output, copy)
    shard = sorted(copy.glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    lines = (copy / "index.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "index.jsonl").write_bytes(b"".join(lines[:-1]))
    return set(differing(output, copy)) == {"index.jsonl", shard.name, "1 rows of index.jsonl"}


def compare(arguments: argparse.Namespace, folder: Path, kills: list[dict[str, Any]], cpu: dict[str, float]) -> None:
    """Write the record of the outputs `one`, `two` and `killed` of the folder.

    Raises:
        MobiusError: the outputs differ.
    """
    one = folder / "one"
    index = json.loads((one / "index.json").read_text(encoding="utf-8"))
    results = {
        "kills": len(kills),
        "kills_with_unfinished_files": sum(kill["unfinished_files"] > 0 for kill in kills),
        "shards": len(index["shards"]),
        "rows": len((one / "index.jsonl").read_bytes().splitlines()),
        "differing_with_2_workers": differing(one, folder / "two"),
        "differing_after_kills": differing(one, folder / "killed"),
        "control_sees_a_byte_and_a_row": control(one, folder / "control"),
    }
    record = {
        "what": "1 worker, 2 workers, and 2 workers killed at random times: shards and index of all three compared",
        "results": results,
        "report": (one / "report" / "report.md").read_text(encoding="utf-8").partition("\n## ")[0].splitlines(),
        "cpu_seconds": cpu,
        "seed": arguments.seed,
        "config": arguments.config.name,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": versions() | {name: importlib.metadata.version(name) for name in PACKAGES},
        "each_kill": kills,
    }
    arguments.record.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    bad = results["differing_with_2_workers"] or results["differing_after_kills"]
    if bad or not results["control_sees_a_byte_and_a_row"]:
        raise MobiusError("the three outputs differ; the record lists the differences")


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="prepare-kills-") as temporary:
        folder = Path(temporary)
        cpu = {
            f"{workers} workers": finish(start(arguments, folder / name, workers), folder / name)
            for workers, name in ((1, "one"), (2, "two"))
        }
        compare(arguments, folder, killed(arguments, folder / "killed"), cpu)


if __name__ == "__main__":
    run(main)
