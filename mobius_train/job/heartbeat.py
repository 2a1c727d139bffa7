"""Detection of dead ranks, which ends the job within half a minute instead of at a collective's timeout.

Every rank writes a beat to the store that the ranks used to meet, with what it does. Rank 0 checks the beats. When a
rank is silent, fails or stalls (`watch.py`), a verdict is written to the store, and it ends all ranks. If the store
does not answer, rank 0 is dead. Each rank sends two small requests per period, about two hundred per second on 512
ranks.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mobius_train.errors import Interrupted, MobiusError
from mobius_train.job.watch import show_stacks

PERIOD = 4.0  # seconds
MISSED = 5  # consecutive beats; a busy machine may miss a few
VERDICT = "verdict"
LEFT = b"left"
STALLED = " stalled: "
# In the verdict after a requested stop.
ASKED = " was asked to stop before the first step"


class Heartbeat:
    """A thread that sends beats and ends the process with `os._exit(1)` when a verdict appears.

    Args:
        store: the store that all ranks joined, see `meet`.
        nodes: the node name of each rank.
        doing: returns what this rank does; it is sent with the beats.
    """

    def __init__(
        self, store: Any, rank: int, nodes: list[str], doing: Callable[[], str], period: float = PERIOD
    ) -> None:
        # A separate connection, because the original one may block for a long time.
        self._store, self._rank, self._nodes, self._period = store.clone(), rank, nodes, period
        self._doing = doing
        self._heard = dict.fromkeys(range(len(nodes)), (b"", 0))
        self._beats, self._over = 0, threading.Event()
        self._talker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="heartbeat")
        self._thread = threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True)
        self._thread.start()

    def fail(self, error: BaseException) -> None:
        """Report this rank's error to the others. After a lost connection, wait first for the verdict on the cause."""
        if _is_lost_contact(error):
            self._thread.join(self._period * (MISSED + 2))
        who = name_of(self._rank, self._nodes)
        reason = f"{who} failed: {type(error).__name__}: {_first_line(error)}"
        if isinstance(error, Interrupted):
            reason = f"{who}{ASKED} ({_first_line(error)})"
        self._ask(lambda: self._store.compare_set(VERDICT, "", reason))
        self._stop()
        if self._rank == 0:
            self._wait_for_the_others(self._period * 2)

    def stalled(self, reason: str) -> None:
        """Report a `stall`, with what every rank does. The process ends after it."""
        verdict = f"{reason}. At the last beat: {self._listed()}"
        self._ask(lambda: self._store.compare_set(VERDICT, "", verdict))
        self._over.set()
        # Without a lost connection the others still are where they wait, and print it.
        time.sleep(self._period * 2)

    def stall(self, reason: str) -> str:
        """Name the ranks that no progress is due to: those that the others wait for, or this one.

        All ranks call the same collectives, so a rank that has begun fewer than another is waited for by it.
        """
        who = name_of(self._rank, self._nodes)
        told = {rank: _parts(beat)[0] for rank, beat in enumerate(self._ask(self._beats_of_all) or [])}
        begun = {rank: int(calls) for rank, calls in told.items() if calls} | {self._rank: collectives_begun()}
        behind = [rank for rank, calls in begun.items() if calls == min(begun.values())]
        if self._rank in behind:
            return f"{who}{STALLED}{reason}"
        names = ", ".join(name_of(rank, self._nodes) for rank in behind[:16])
        return f"{names}{STALLED}{who} waits there, with {reason}"

    def _listed(self) -> str:
        doing = [_parts(beat)[1] for beat in self._ask(self._beats_of_all) or []]
        return "; ".join(f"{name_of(rank, self._nodes)}: {text}" for rank, text in list(enumerate(doing))[:16])

    def leave(self) -> None:
        """End this rank's beats. Rank 0 serves the store, so it waits for the others and still detects dead ranks."""
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
                # A node without power neither answers nor refuses, so the request needs a timeout.
                verdict = self._talker.submit(self._talk).result(timeout=self._period * MISSED)
            except (RuntimeError, TimeoutError):
                verdict = f"{name_of(0, self._nodes)}, which serves the store, no longer answers"
            if verdict and not self._over.is_set():
                self._end(verdict)

    def _talk(self) -> str:
        """Send one beat and return the verdict, or an empty string."""
        self._beats += 1
        self._store.set(_beat(self._rank), f"{self._beats} {collectives_begun()} {self._doing()}")
        if self._rank == 0 and (silent := self._silent()):
            names = ", ".join(name_of(rank, self._nodes) for rank in silent)
            self._store.compare_set(VERDICT, "", f"no sign of life for {self._period * MISSED:.0f} s from {names}")
        return self._store.get(VERDICT).decode() if self._store.check([VERDICT]) else ""

    def _silent(self) -> list[int]:
        """Return the ranks without a new beat for MISSED of this rank's periods, so a suspended job is unaffected."""
        for rank, beat in enumerate(self._beats_of_all()):
            last, missed = self._heard[rank]
            self._heard[rank] = beat, (0 if beat != last or beat == LEFT else missed + 1)
        return [rank for rank, (_, missed) in self._heard.items() if missed >= MISSED and rank != 0]

    def _end(self, verdict: str) -> None:
        if STALLED in verdict:
            show_stacks()
        print(f"error: rank {self._rank} ends: {verdict}; resume from the last checkpoint", file=sys.stderr, flush=True)
        if self._rank == 0:
            # The store ends with rank 0, so the others need time to read the verdict.
            time.sleep(self._period * 2)
        # The main thread may be blocked in a collective.
        os._exit(os.EX_TEMPFAIL if ASKED in verdict else 1)

    def _beats_of_all(self) -> list[bytes]:
        beats: list[bytes] = self._store.multi_get([_beat(rank) for rank in range(len(self._nodes))])
        return beats

    def _ask(self, request: Any) -> Any:
        """Return the store's answer, or None if it does not answer at the end of a job."""
        try:
            return self._talker.submit(request).result(timeout=self._period * MISSED)
        except (RuntimeError, TimeoutError):
            return None


def meet(store: Any, rank: int, world_size: int, node: str, timeout: timedelta, expected: list[str]) -> list[str]:
    """Wait for all ranks and return the node name of each.

    Args:
        expected: the node name of each rank from the launcher; [] if unknown.

    Raises:
        MobiusError: some ranks did not join in time; the message names them.
    """
    store.set(_beat(rank), "0")
    store.set(_node(rank), node)
    try:
        if rank == 0:
            store.wait([_node(other) for other in range(world_size)], timeout)
            store.set("met", "")
        else:
            # Rank 0 times out first and names the missing ranks.
            store.wait(["met"], timeout + timedelta(seconds=10))
    except RuntimeError:
        missing = [other for other in range(world_size) if not store.check([_node(other)])]
        names = ", ".join(name_of(other, expected) for other in missing) or name_of(0, expected)
        raise MobiusError(
            f"{len(missing)} of {world_size} ranks did not join within {timeout.total_seconds():.0f} s: {names}."
            " Look for their errors above, or exclude the node (sbatch --exclude)"
        ) from None
    return [value.decode() for value in store.multi_get([_node(other) for other in range(world_size)])]


def collectives_begun() -> int:
    """The number of collectives that this process has begun, in all its groups."""
    if not dist.is_initialized():
        return 0
    return sum(map(_begun_in, list(dist.distributed_c10d._world.pg_map)))


def _begun_in(group: Any) -> int:
    try:
        return int(group._get_sequence_number_for_group())
    # NCCL before its first collective.
    except RuntimeError:
        return 0


def _parts(beat: bytes) -> tuple[str, str]:
    """The collectives and the activity of a beat; empty of a rank that has just met or left."""
    _, _, rest = beat.decode().partition(" ")
    calls, _, doing = rest.partition(" ")
    return calls, doing


def name_of(rank: int, nodes: list[str]) -> str:
    return f"rank {rank} on {nodes[rank]}" if rank < len(nodes) else f"rank {rank}"


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _node(rank: int) -> str:
    return f"node/{rank}"


def _is_lost_contact(error: BaseException) -> bool:
    """True for a lost connection; gloo raises a plain RuntimeError that names its source file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
