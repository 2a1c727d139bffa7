"""Stopping on request: a signal or a file, seen by any rank, ends the run after a checkpoint at the next step boundary."""

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


class Stop:
    """Whether this rank was asked to stop; the trainer combines the ranks' answers once a step.

    Args:
        file: where somebody asks by touching it; looked for on the rank that is given it.
    """

    def __init__(self, file: Path | None) -> None:
        self._file, self._signalled, self._pid = file, False, os.getpid()

    def asked(self) -> bool:
        return self._signalled or (self._file is not None and self._file.exists())

    def done(self) -> None:
        """What was asked for has been done: the file would stop the next run too."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

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
