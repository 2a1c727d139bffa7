"""All trackers of a run. None of them can stop the run, or hold it up.

Each has a thread, which gives it the records. A tracker that fails, or that does not keep up, is given up: the reason
is logged once, and the run goes on without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from types import TracebackType

from mobius_train.errors import Stopped
from mobius_train.metrics.trackers.groups import grouped
from mobius_train.metrics.trackers.tracker import Outcome, Tracker, samples_of

logger = logging.getLogger(__name__)

Record = Callable[[Tracker], None]
# Records that wait for a tracker.
WAITING = 20_000
# Seconds for the last records at the end of the run.
END = 60.0


class Followers:
    """Context manager that gives every tracker the same records, and ends all of them."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._followers = [_Follower(name, tracker) for name, tracker in trackers.items()]

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of metrics.jsonl."""
        values = grouped(metrics)
        for follower in self._followers:
            follower.put(lambda tracker: tracker.scalars(step, values))

    def samples(self, step: int, paths: list[Path]) -> None:
        """Record the pictures among the files of a validation."""
        for follower in self._followers:
            follower.put(lambda tracker: tracker.samples(step, samples_of(paths)))

    def __enter__(self) -> Followers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome: Outcome = "finished" if error is None else "stopped" if isinstance(error, Stopped) else "failed"
        for follower in self._followers:
            follower.put(lambda tracker: tracker.close(outcome))
        for follower in self._followers:
            follower.end()


class _Follower:
    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker, self._given_up = name, tracker, False
        self._records: Queue[Record | None] = Queue(WAITING)
        # A daemon, because a tracker may wait for its server for ever.
        self._thread = Thread(target=self._follow, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, record: Record | None) -> None:
        if self._given_up:
            return
        try:
            self._records.put_nowait(record)
        except Full:
            self._give_up(f"it is {WAITING} records behind the run")

    def end(self) -> None:
        """Wait for the last records."""
        self.put(None)
        self._thread.join(0 if self._given_up else END)
        if self._thread.is_alive():
            self._give_up(f"it did not take the last {self._records.qsize()} records within {END:g} s")

    def _follow(self) -> None:
        try:
            while (record := self._records.get()) is not None and not self._given_up:
                record(self._tracker)
        # Trackers call servers and write files, and their clients document no errors. Some call sys.exit.
        except BaseException as error:
            self._give_up(f"{type(error).__name__}: {error}")
            with suppress(Exception):
                self._tracker.close("failed")

    def _give_up(self, reason: str) -> None:
        if not self._given_up:
            self._given_up = True
            logger.error(
                "report_to=%s: %s. The run goes on without this tracker; metrics.jsonl has all metrics",
                self._name,
                reason,
            )
