"""Stop requests by a signal or a file.

During the training loop a request makes the run save a checkpoint at the next step and end. Before the first step there
is nothing to save, and the run ends at once: loading models and encoding a data set take longer than a job is given to
end.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mobius_train.errors import Interrupted
from mobius_train.files import replace_file
from mobius_train.job.watch import show_stacks_on_signal
from mobius_train.run_files import STOPPED

# Slurm sends SIGUSR1 ahead of the time limit, as requested by --signal, and SIGTERM shortly before it ends the job.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
FILE = "stop"
POLL = 0.5  # seconds


logger = logging.getLogger(__name__)


class Stop:
    """The stop request of this rank. The trainer combines the requests of all ranks once per step."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._looks = False
        self._signalled, self._interrupts, self._pid = False, True, os.getpid()
        # Held while the file becomes a signal, which without a handler would kill the process.
        self._raising = threading.Lock()

    @property
    def watches(self) -> bool:
        """True once `watch` was called."""
        return self._folder is not None

    def watch(self, folder: Path, looks: bool) -> None:
        """Mark a stop in this folder. One rank `looks` for a file named `stop` there, too.

        Raises:
            Interrupted: the file is there.
        """
        self._folder, self._looks = folder, looks
        if not looks:
            return
        (folder / STOPPED).unlink(missing_ok=True)
        if self._file_exists():
            raise Interrupted(f"{folder / FILE} exists")
        self._start_polling()

    def _start_polling(self) -> None:
        threading.Thread(target=self._poll, name="stop", daemon=True).start()

    def defer(self) -> None:
        """From now on a request waits for the next step."""
        self._interrupts = False

    def defer_no_more(self) -> None:
        """From now on a request ends the run at once again, until the first step of the next stage.

        Raises:
            Interrupted: there was a request after the last step.
        """
        self._interrupts = True
        if self.asked():
            self._interrupts = False
            raise Interrupted("a request after the last step of the stage before")
        if self._looks:
            self._start_polling()

    def asked(self) -> bool:
        """True once a stop was requested."""
        return self._signalled or self._file_exists()

    def done(self, step: int) -> None:
        """Mark the run as stopped and remove the request, which would stop the next run too."""
        if self._folder is None:
            return
        try:
            replace_file(self._folder / STOPPED, f"{step}\n")
            (self._folder / FILE).unlink(missing_ok=True)
        except OSError as error:
            # The checkpoint is saved all the same.
            logger.error("%s: %s; scripts cannot see that the run was asked to stop", self._folder, error.strerror)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals, and Ctrl-C, which ends the process when it comes a second time.

        Raises:
            Interrupted: a request came before `defer`.
        """
        numbers = (*SIGNALS, signal.SIGINT)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            with self._raising:
                self._interrupts = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Forked children inherit the handler.
        if os.getpid() != self._pid:
            return
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        if self._interrupts:
            # Once: further signals must not disturb the end.
            self._interrupts = False
            raise Interrupted(f"signal {signal.Signals(number).name}")

    def _file_exists(self) -> bool:
        return self._looks and self._folder is not None and (self._folder / FILE).exists()

    def _poll(self) -> None:
        while self._interrupts:
            if self._file_exists():
                with self._raising:
                    if self._interrupts:
                        # The handler runs in the main thread, and wakes it.
                        signal.pthread_kill(threading.main_thread().ident or 0, SIGNALS[0])
                return
            threading.Event().wait(POLL)


def leave_to_parent(worker: int) -> None:
    """Ignore the signals in a data worker. Slurm signals all processes, and a dead worker would end the run unsaved."""
    show_stacks_on_signal()
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
