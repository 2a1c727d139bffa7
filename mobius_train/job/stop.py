"""Stopping on request: a signal or a file ends the run after a checkpoint at the next step boundary."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# What Slurm sends before it takes the nodes away: the signal that was asked for in time, and the last warning.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
FILE = "stop"
# Says to a script that the run has stopped so; exit codes do not, as srun kills the other ranks after the first.
MARK = "stopped"


class Stop:
    """Whether this rank was asked to stop; the trainer combines the ranks' answers once a step.

    Args:
        folder: where somebody asks by touching `stop`; for the one rank that looks there.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._signalled, self._pid = folder, False, os.getpid()
        if folder is not None:
            (folder / MARK).unlink(missing_ok=True)

    def asked(self) -> bool:
        return self._signalled or (self._folder is not None and (self._folder / FILE).exists())

    def done(self, step: int) -> None:
        """What was asked for has been done; the file would stop the next run too."""
        if self._folder is not None:
            (self._folder / MARK).write_text(f"{step}\n", encoding="utf-8")
            (self._folder / FILE).unlink(missing_ok=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals set a flag and interrupt nothing, also while a checkpoint is being written."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked child has inherited the handler.
        if os.getpid() == self._pid:
            self._signalled = True


def leave_to_parent(worker: int) -> None:
    """For data workers: Slurm signals every process of a step, and a worker that dies would end the run unsaved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
