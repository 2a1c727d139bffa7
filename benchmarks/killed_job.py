"""The ranks of a run as processes that can be killed together or alone, for the kill benchmarks."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mobius_train.errors import MobiusError

REPOSITORY = Path(__file__).resolve().parents[1]
RESUMED = re.compile(r"resumed from \S*checkpoint-(\d+)")
# Seconds in which the other ranks of a killed one must have ended: the heartbeat's bound, and a loaded machine.
LEAVE = 90.0


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of all kill benchmarks."""
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe")
    parser.add_argument("--deepspeed", type=Path, default=REPOSITORY / "ds_configs" / "zero2.json")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--record", type=Path, required=True, help="the JSON to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")


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

    def kill(self, ranks: Sequence[int] | None = None) -> float:
        """Kill these ranks, by default all, and wait for the end of the others.

        Returns:
            The seconds until all ranks had ended.

        Raises:
            MobiusError: another rank did not end within LEAVE seconds.
        """
        killed = time.monotonic()
        for rank, process in enumerate(self._processes):
            if ranks is None or rank in ranks:
                os.killpg(process.pid, signal.SIGKILL)
        try:
            for process in self._processes:
                process.wait(LEAVE)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise MobiusError(f"rank(s) {ranks} were killed, and another lived for {LEAVE:.0f} s more") from error
        return time.monotonic() - killed

    def finish(self) -> None:
        codes = [process.wait() for process in self._processes]
        if any(codes):
            raise MobiusError(f"the run failed (exit codes {codes}):\n{self.log.read_text()[-3000:]}")

    def resumed_from(self) -> int | None:
        found = RESUMED.search(self.log.read_text())
        return int(found[1]) if found else None
