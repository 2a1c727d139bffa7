"""Stop requests: a signal or a file makes the run save a checkpoint at the next step and end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# Slurm sends SIGUSR1 ahead of the time limit, as requested by --signal, and SIGTERM shortly before it ends the job.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
FILE = "stop"
# Marks a requested stop for scripts. Exit codes are not reliable, because srun kills the other ranks after the first.
MARK = "stopped"


class Stop:
    """The stop request of this rank. The trainer combines the requests of all ranks once per step.

    Args:
        folder: the folder in which a file named `stop` requests a stop; None on ranks that do not look for it.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._signalled, self._pid = folder, False, os.getpid()
        if folder is not None:
            (folder / MARK).unlink(missing_ok=True)

    def asked(self) -> bool:
        """True once a stop was requested."""
        return self._signalled or (self._folder is not None and (self._folder / FILE).exists())

    def done(self, step: int) -> None:
        """Mark the run as stopped and remove the request, which would stop the next run too."""
        if self._folder is not None:
            (self._folder / MARK).write_text(f"{step}\n", encoding="utf-8")
            (self._folder / FILE).unlink(missing_ok=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals by setting a flag, which interrupts nothing, such as writing a checkpoint."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Forked children inherit the handler.
        if os.getpid() == self._pid:
            self._signalled = True


def leave_to_parent(worker: int) -> None:
    """Ignore the signals in a data worker. Slurm signals all processes, and a dead worker would end the run unsaved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
