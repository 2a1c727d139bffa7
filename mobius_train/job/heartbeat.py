"""Who of the job is alive, so that a dead node ends the job in half a minute, and not a collective in an hour.

Every rank beats in the store in which the ranks have met. Rank 0 listens; the first verdict that is written there, that
a rank has fallen silent or has failed, ends all of them. Silence of the store itself means rank 0. Two small requests
of a rank in a period make some two hundred in a second on 512 ranks.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mobius_train.errors import MobiusError

PERIOD = 4.0  # seconds
MISSED = 5  # beats in a row; a busy machine may skip a few
VERDICT = "verdict"
LEFT = b"left"


class Heartbeat:
    """Beats and listens in a thread of its own, which ends the process by `os._exit(1)` when there is a verdict.

    Args:
        store: in which all ranks have met, see `meet`.
        nodes: the node's name by rank.
    """

    def __init__(self, store: Any, rank: int, nodes: list[str], period: float = PERIOD) -> None:
        # A connection of its own: the other one may be waiting for an answer for long.
        self._store, self._rank, self._nodes, self._period = store.clone(), rank, nodes, period
        self._heard = dict.fromkeys(range(len(nodes)), (b"", 0))
        self._beats, self._over = 0, threading.Event()
        self._talker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="heartbeat")
        self._thread = threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True)
        self._thread.start()

    def fail(self, error: BaseException) -> None:
        """This rank ends by an error: the others hear of it, or, if it has only lost another one, it hears which."""
        if _is_lost_contact(error):
            self._thread.join(self._period * (MISSED + 2))
        reason = f"{name_of(self._rank, self._nodes)} has failed: {type(error).__name__}: {_first_line(error)}"
        self._ask(lambda: self._store.compare_set(VERDICT, "", reason))
        self._stop()
        if self._rank == 0:
            self._wait_for_the_others(self._period * 2)

    def leave(self) -> None:
        """This rank is done. Rank 0, whose store goes with it, waits for the others; one that dies now is noticed."""
        if self._rank == 0:
            self._wait_for_the_others(math.inf)
        self._stop()

    def _stop(self) -> None:
        self._over.set()
        self._thread.join()
        self._ask(lambda: self._store.set(_beat(self._rank), LEFT))

    def _wait_for_the_others(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while set((self._ask(self._beats_of_all) or [])[1:]) - {LEFT} and time.monotonic() < deadline:
            time.sleep(self._period / 20)

    def _watch(self) -> None:
        while not self._over.wait(self._period):
            try:
                # A node without power answers nothing, and refuses nothing either.
                verdict = self._talker.submit(self._talk).result(timeout=self._period * MISSED)
            except (RuntimeError, TimeoutError):
                verdict = f"{name_of(0, self._nodes)}, which the ranks meet at, does not answer any more"
            if verdict and not self._over.is_set():
                self._end(verdict)

    def _talk(self) -> str:
        """One beat; returns the verdict, if there is one."""
        self._beats += 1
        self._store.set(_beat(self._rank), str(self._beats))
        if self._rank == 0 and (silent := self._silent()):
            names = ", ".join(name_of(rank, self._nodes) for rank in silent)
            self._store.compare_set(VERDICT, "", f"no sign of life for {self._period * MISSED:.0f} s from {names}")
        return self._store.get(VERDICT).decode() if self._store.check([VERDICT]) else ""

    def _silent(self) -> list[int]:
        """Whose beat has not changed for MISSED periods of this rank's own: a job suspended as a whole loses nobody."""
        for rank, beat in enumerate(self._beats_of_all()):
            last, missed = self._heard[rank]
            self._heard[rank] = beat, (0 if beat != last or beat == LEFT else missed + 1)
        return [rank for rank, (_, missed) in self._heard.items() if missed >= MISSED and rank != 0]

    def _end(self, verdict: str) -> None:
        print(f"error: rank {self._rank} ends: {verdict}; go on from the last checkpoint", file=sys.stderr, flush=True)
        if self._rank == 0:
            # The store goes with it: the others hear the verdict first.
            time.sleep(self._period * 2)
        # The main thread may be inside a collective that does not come back.
        os._exit(1)

    def _beats_of_all(self) -> list[bytes]:
        beats: list[bytes] = self._store.multi_get([_beat(rank) for rank in range(len(self._nodes))])
        return beats

    def _ask(self, request: Any) -> Any:
        """What the store answers; None if it does not, at the end of a job."""
        try:
            return self._talker.submit(request).result(timeout=self._period * MISSED)
        except (RuntimeError, TimeoutError):
            return None


def meet(store: Any, rank: int, world_size: int, node: str, timeout: timedelta, expected: list[str]) -> list[str]:
    """Wait for all ranks; returns the node of each.

    Args:
        expected: the node's name by rank, as far as the launcher says; [] if it does not.

    Raises:
        MobiusError: not all have come in time; names those that have not.
    """
    store.set(_beat(rank), "0")
    store.set(_node(rank), node)
    try:
        if rank == 0:
            store.wait([_node(other) for other in range(world_size)], timeout)
            store.set("met", "")
        else:
            # Rank 0 says who is missing.
            store.wait(["met"], timeout + timedelta(seconds=10))
    except RuntimeError:
        missing = [other for other in range(world_size) if not store.check([_node(other)])]
        names = ", ".join(name_of(other, expected) for other in missing) or name_of(0, expected)
        raise MobiusError(
            f"{len(missing)} of {world_size} ranks have not come within {timeout.total_seconds():.0f} s: {names}."
            " Look for their errors above, or leave the node out (sbatch --exclude)"
        ) from None
    return [value.decode() for value in store.multi_get([_node(other) for other in range(world_size)])]


def name_of(rank: int, nodes: list[str]) -> str:
    return f"rank {rank} on {nodes[rank]}" if rank < len(nodes) else f"rank {rank}"


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _node(rank: int) -> str:
    return f"node/{rank}"


def _is_lost_contact(error: BaseException) -> bool:
    """gloo tells it by a plain RuntimeError with its own source file in it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
