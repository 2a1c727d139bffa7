"""Kill a run at random times, including saves, resume it, and compare its result with an uninterrupted run.

    python benchmarks/kill_resume.py --config recipe.yaml --kills 50 --ranks 2 --record benchmarks/kill_resume.json \
        checkpointing_steps=1 max_train_steps=400

All ranks receive SIGKILL at once: a third of the kills during a checkpoint write, a few during the start, the others
after a random time. After each kill the run must resume from the last or last-but-one complete checkpoint. At the end,
losses and final weights must be bit-identical to the uninterrupted run. Exits 1 on any deviation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobius_train.checkpoint.folders import TEMPORARY, checkpoints
from mobius_train.checkpoint.format import step_of
from mobius_train.checkpoint.verify import problems
from mobius_train.cli import run
from mobius_train.errors import MobiusError
from mobius_train.job.versions import versions

REPOSITORY = Path(__file__).resolve().parents[1]
RESUMED = re.compile(r"resumed from \S*checkpoint-(\d+)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe")
    parser.add_argument("--deepspeed", type=Path, default=REPOSITORY / "ds_configs" / "zero2.json")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--longest", type=float, default=3.0, help="seconds from a start's first step to its kill")
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    return parser.parse_args()


@dataclass
class Kill:
    """The circumstances and the outcome of a kill."""

    when: str
    seconds_after_start: float
    steps_done: int
    save_was_on_its_way: bool
    whole_checkpoints: list[int]
    damaged_checkpoints: list[int]
    resumed_from: int | None = None


class Job:
    """The ranks of one start, each in its own session, so that no process survives a kill."""

    def __init__(self, arguments: argparse.Namespace, output: Path, *overrides: str) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.log = output.with_suffix(".log")
        self.started = time.monotonic()
        self._processes = []
        main = [str(REPOSITORY / "mobius_train" / "main.py"), "--config", str(arguments.config)]
        values = [*arguments.overrides, f"output_dir={output}", *overrides]
        for rank in range(arguments.ranks):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(arguments.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            with self.log.open("w" if rank == 0 else "a") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, *main, "--deepspeed", str(arguments.deepspeed), *values],
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,
                    )
                )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def check_running(self) -> None:
        if any(process.poll() is not None for process in self._processes):
            codes = [process.poll() for process in self._processes]
            raise MobiusError(f"the run ended by itself (exit codes {codes}):\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        for process in self._processes:
            os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def finish(self) -> None:
        codes = [process.wait() for process in self._processes]
        if any(codes):
            raise MobiusError(f"the run failed (exit codes {codes}):\n{self.log.read_text()[-3000:]}")

    def resumed_from(self) -> int | None:
        found = RESUMED.search(self.log.read_text())
        return int(found[1]) if found else None


def lines(output: Path) -> list[str]:
    path = output / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_step(job: Job, output: Path, taken: int) -> None:
    """Wait for a step beyond the first step of all earlier starts, so that every start makes progress."""
    while _last_step(output) <= taken or (job.resumed_from() is None and taken > 0):
        job.check_running()
        time.sleep(0.01)


def kill_once(job: Job, output: Path, begun: int, chance: random.Random, longest: float, startup: float) -> Kill:
    """Kill the job after a random time."""
    when = chance.choices(["saving", "running", "starting"], [0.35, 0.55, 0.1])[0]
    if when == "starting":
        until = chance.uniform(0.2, 1.0) * startup
        while job.seconds < until:
            job.check_running()
            time.sleep(0.005)
    else:
        wait_for_step(job, output, begun)
        until = job.seconds + chance.uniform(0, longest)
        while job.seconds < until:
            job.check_running()
            time.sleep(0.002)
        while when == "saving" and not list(output.glob(TEMPORARY)):
            job.check_running()
        if when == "saving":
            time.sleep(chance.choice([0, 0.001, 0.005, 0.02]))
    on_its_way = bool(list(output.glob(TEMPORARY)))
    seconds = job.seconds
    job.kill()
    damaged = [folder for folder in checkpoints(output) if problems(folder)]
    whole = [step_of(folder) for folder in checkpoints(output) if folder not in damaged]
    return Kill(when, round(seconds, 3), _last_step(output), on_its_way, whole, [step_of(f) for f in damaged])


def interrupted(arguments: argparse.Namespace, output: Path, startup: float) -> list[Kill]:
    """Kill and resume the requested number of times, then let the run finish."""
    chance = random.Random(arguments.seed)
    kills: list[Kill] = []
    while len(kills) <= arguments.kills:
        whole = kills[-1].whole_checkpoints if kills else []
        if not whole:
            # A run killed before its first checkpoint has nothing to resume from.
            shutil.rmtree(output, ignore_errors=True)
        job = Job(arguments, output, *(["resume_from_checkpoint=latest"] if whole else []))
        begun = whole[-1] if whole else 0
        try:
            if len(kills) == arguments.kills:
                job.finish()
                _resumed(kills, job)
                return kills
            kill = kill_once(job, output, begun, chance, arguments.longest, startup)
        except BaseException:
            job.kill()
            raise
        _resumed(kills, job)
        kills.append(kill)
        print(f"kill {len(kills)}: {kill}", flush=True)
    return kills


def _resumed(kills: list[Kill], job: Job) -> None:
    """Record the checkpoint that the start after the last kill resumed from, unless that start was killed first."""
    if kills and kills[-1].whole_checkpoints:
        kills[-1].resumed_from = job.resumed_from()


def _last_step(output: Path) -> int:
    steps = [json.loads(line)["step"] for line in lines(output) if line.endswith("}")]
    return max(steps, default=0)


def _hashes(output: Path) -> dict[str, str]:
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((output / "final").rglob("*.safetensors"))
    }


def _losses(output: Path) -> list[Any]:
    return [(line["step"], line["loss"]) for line in map(json.loads, lines(output)) if "loss" in line]


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        job = Job(arguments, whole)
        wait_for_step(job, whole, 0)
        startup = job.seconds
        job.finish()
        kills = interrupted(arguments, parts, startup)
        final = _hashes(whole)
        resumed = [kill for kill in kills if kill.resumed_from is not None]
        results = {
            "kills": len(kills),
            "kills_with_a_save_on_its_way": sum(kill.save_was_on_its_way for kill in kills),
            "kills_before_the_first_checkpoint": sum(not kill.whole_checkpoints for kill in kills),
            "damaged_checkpoints_under_a_good_name": sum(len(kill.damaged_checkpoints) for kill in kills),
            "resumed_from_the_last": sum(kill.resumed_from == kill.whole_checkpoints[-1] for kill in resumed),
            "resumed_from_the_last_but_one": sum(
                kill.resumed_from in kill.whole_checkpoints[-2:-1] for kill in resumed
            ),
            "killed_again_before_resuming": sum(
                kill.resumed_from is None and bool(kill.whole_checkpoints) for kill in kills
            ),
            "resumed_from_another": sum(kill.resumed_from not in kill.whole_checkpoints[-2:] for kill in resumed),
            "losses_equal": _losses(parts) == _losses(whole),
            "final_weights_equal": bool(final) and _hashes(parts) == final,
        }
        record = {
            "what": "random SIGKILLs of all ranks against an uninterrupted run",
            "results": results,
            "ranks": arguments.ranks,
            "steps": len(_losses(whole)),
            "seed": arguments.seed,
            "deepspeed": arguments.deepspeed.name,
            "config": arguments.config.name,
            "overrides": arguments.overrides,
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
            "versions": versions(),
            "final": final,
            "each_kill": [asdict(kill) for kill in kills],
        }
        arguments.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(results, indent=1))
        good = results["losses_equal"] and results["final_weights_equal"] and not results["resumed_from_another"]
        if not good or results["damaged_checkpoints_under_a_good_name"]:
            raise MobiusError(
                "the interrupted run differs from the uninterrupted run; the record lists the differences"
            )


if __name__ == "__main__":
    run(main)
