"""The ranks of a run as processes that can be killed together or alone, for the kill benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import preloaded

from mobius_train.cli import add_deepspeed_option
from mobius_train.errors import MobiusError
from mobius_train.files import replace_file
from mobius_train.job.versions import versions
from mobius_train.shared_files import REPOSITORY

MAIN = str(REPOSITORY / "mobius_train" / "main.py")
RESUMED = re.compile(r"resumed from \S*checkpoint-(\d+)")
# Seconds in which the other ranks of a killed one must have ended: the heartbeat's bound, and a loaded machine.
LEAVE = 90.0


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of all kill benchmarks."""
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe")
    add_deepspeed_option(parser)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the instants, one campaign for each")
    parser.add_argument("--record", type=Path, required=True, help="JSON; seeds that it contains are not run again")
    parser.add_argument(
        "--preloaded",
        action="store_true",
        help="fork the ranks from a process that has imported the libraries, which saves 9 s of a core for each",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")


def run_seeds(arguments: argparse.Namespace, what: str, campaign: Callable[[int], dict[str, Any]]) -> None:
    """Run the campaign of each seed that the record lacks, and add its results to the record.

    Args:
        campaign: runs the kills of a seed, and returns its results: counts, which are added up, flags, which must all
            hold, and seconds, of which the longest counts.

    Raises:
        MobiusError: the record is of other settings, or a campaign failed.
    """
    settings = {
        "what": what,
        "ranks": arguments.ranks,
        "preloaded": arguments.preloaded,
        "deepspeed": arguments.deepspeed.name,
        "config": arguments.config.name,
        "overrides": arguments.overrides,
    }
    record: dict[str, Any] = {**settings, "total": {}, "campaigns": []}
    if arguments.record.exists():
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
        if {name: record.get(name) for name in settings} != settings:
            raise MobiusError(f"{arguments.record} is a record of other settings: use another --record")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()}
    for seed in arguments.seeds:
        if any(done["seed"] == seed for done in record["campaigns"]):
            continue
        results = campaign(seed)
        about = {"seed": seed, "machine": machine, "versions": versions()}
        record["campaigns"].append({**about, "results": results})
        record["total"] = total([done["results"] for done in record["campaigns"]])
        replace_file(arguments.record, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["total"], indent=1))


def total(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """See `run_seeds`."""
    names = dict.fromkeys(name for one in results for name in one)
    return {name: _total([one[name] for one in results if name in one]) for name in names}


def _total(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return total(values)
    if isinstance(values[0], bool):
        return all(values)
    return sum(values) if isinstance(values[0], int) else max(values)


class Job:
    """The ranks of one start, each in its own session, so that no process survives a kill.

    Args:
        script: what the ranks run, with the arguments before those of `main.py`.
    """

    def __init__(
        self, arguments: argparse.Namespace, output: Path, *overrides: str, script: Sequence[str] = (MAIN,)
    ) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.log = output.with_suffix(".log")
        self.started = time.monotonic()
        self._processes: list[Any] = []
        start: Any = preloaded.Popen if arguments.preloaded else subprocess.Popen
        options = ["--config", str(arguments.config), "--deepspeed", str(arguments.deepspeed)]
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
                    start(
                        [sys.executable, *script, *options, *values],
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,
                    )
                )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def running(self) -> bool:
        """True while all ranks run."""
        return all(process.poll() is None for process in self._processes)

    def check_running(self) -> None:
        if not self.running:
            codes = [process.poll() for process in self._processes]
            raise MobiusError(f"the run ended by itself (exit codes {codes}):\n{self.log.read_text()[-3000:]}")

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to these ranks, by default to all; those that have ended get none."""
        for rank, process in enumerate(self._processes):
            if (ranks is None or rank in ranks) and process.poll() is None:
                os.killpg(process.pid, number)

    def end(self, seconds: float) -> list[int]:
        """Wait for the end of all ranks, and return their exit codes.

        Raises:
            MobiusError: a rank did not end in time; all were killed.
        """
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(0.01, until - time.monotonic())) for process in self._processes]
        except subprocess.TimeoutExpired as error:
            living = [rank for rank, process in enumerate(self._processes) if process.poll() is None]
            self.send(signal.SIGKILL)
            raise MobiusError(
                f"rank(s) {living} lived for {seconds:.0f} s more:\n{self.log.read_text()[-3000:]}"
            ) from error

    def kill(self, ranks: Sequence[int] | None = None) -> float:
        """Kill these ranks, by default all, and wait for the end of the others.

        Returns:
            The seconds until all ranks had ended.

        Raises:
            MobiusError: another rank did not end within LEAVE seconds.
        """
        killed = time.monotonic()
        self.send(signal.SIGKILL, ranks)
        self.end(LEAVE)
        return time.monotonic() - killed

    def finish(self) -> None:
        codes = [process.wait() for process in self._processes]
        if any(codes):
            raise MobiusError(f"the run failed (exit codes {codes}):\n{self.log.read_text()[-3000:]}")

    def resumed_from(self) -> int | None:
        found = RESUMED.search(self.log.read_text())
        return int(found[1]) if found else None
