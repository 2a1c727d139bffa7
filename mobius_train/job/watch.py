"""Detection of a process that lives but makes no progress: asleep in a loader, in a collective, or at a dead disk.

Each activity has a limit of seconds. At the limit the process prints the stacks of all its threads and of its data
workers, reports to the other ranks, and ends. Time is counted in ticks of this process, so a suspended job is not
affected.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

TICK = 1.0  # seconds
# On this signal data workers print their stacks.
SHOW_STACKS = signal.SIGUSR2


@dataclass
class _Activity:
    limit: str
    text: str
    seconds: float = 0.0


class Watch:
    """The activities of this process: that of the main thread, and those of threads beside it.

    Args:
        limits: seconds by name; empty for no judgement.
        stalled: called with a description before the process ends.
    """

    def __init__(self, limits: Mapping[str, float], stalled: Callable[[str], None]) -> None:
        self._limits, self._stalled = dict(limits), stalled
        self._main = _Activity("", "the start")
        self._beside: list[_Activity] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if limits:
            self._thread.start()

    @property
    def doing(self) -> str:
        """What the main thread does."""
        return self._main.text

    def enter(self, limit: str, text: str) -> None:
        """Begin an activity of the main thread, which ends the one before it.

        Args:
            limit: name of the limit; without one of this name the activity may take any time.
        """
        self._main = _Activity(limit, text)

    def judge_by(self, limits: Mapping[str, float]) -> None:
        """Replace the limits."""
        self._limits = dict(limits)

    @contextmanager
    def beside(self, limit: str, text: str) -> Iterator[None]:
        """Context for an activity of another thread."""
        activity = _Activity(limit, text)
        self._beside.append(activity)
        try:
            yield
        finally:
            self._beside.remove(activity)

    def close(self) -> None:
        """End the judgement."""
        self._over.set()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            passed, last = min(now - last, 2 * TICK), now
            for activity in (self._main, *self._beside):
                activity.seconds += passed
                if activity.seconds > self._limits.get(activity.limit, float("inf")):
                    self._end(activity)

    def _end(self, activity: _Activity) -> None:
        limit = self._limits[activity.limit]
        show_stacks()
        self._stalled(f"no progress for {limit:g} s (time_limits.{activity.limit}) in {activity.text}")
        os._exit(1)


def show_stacks() -> None:
    """Print the stacks of all threads of this process and of its data workers."""
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    workers = [worker.pid for worker in multiprocessing.active_children() if worker.pid is not None]
    for worker in workers:
        with suppress(OSError):
            os.kill(worker, SHOW_STACKS)
    if workers:
        time.sleep(1)


def show_stacks_on_signal() -> None:
    """Let this data worker answer `show_stacks`."""
    faulthandler.register(SHOW_STACKS, file=sys.__stderr__ or 2, all_threads=True)
