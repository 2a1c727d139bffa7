"""`mobius_train/main.py`, one of whose ranks hangs for ever in one phase: for hangs.py.

    python benchmarks/hanging_main.py RANK LIMIT OCCURRENCE [arguments of main.py]

The rank hangs when it enters the phase with this limit (see `time_limits`) for this time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mobius_train.job.watch import Watch
from mobius_train.main import main


def hang(limit: str, occurrence: int) -> None:
    """Let this process hang in a phase."""
    entered, beside, left = Watch.enter, Watch.beside, [occurrence]

    def reached(one: str) -> bool:
        left[0] -= one == limit
        return one == limit and left[0] == 0

    def enter(watch: Watch, one: str, text: str) -> None:
        entered(watch, one, text)
        if reached(one):
            asleep()

    @contextmanager
    def in_thread(watch: Watch, one: str, text: str) -> Iterator[None]:
        with beside(watch, one, text):
            if reached(one):
                asleep()
            yield

    Watch.enter, Watch.beside = enter, in_thread  # type: ignore[method-assign,assignment]


def asleep() -> None:
    print("hangs now", flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    rank, limit, occurrence = sys.argv[1:4]
    del sys.argv[1:4]
    if os.environ["RANK"] == rank:
        hang(limit, int(occurrence))
    main()
