"""The lock of a run's folder: two runs in one folder would overwrite each other's metrics, checkpoints and model.

The file `.running` names the holder, which touches it every BEAT seconds. The lock of a holder that is over is taken:
its process is gone from this node, it has ended and says so, or it has not touched the file for SILENT seconds by the
clock of the file system or while a start waits for it. So a requeued job takes the lock of its last start on any node.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mobius_train.errors import MobiusError
from mobius_train.files import open_regular, process_lives, process_place, replace_file, temporary_of
from mobius_train.job.environment import job_name, node_name

FILE = ".running"
# Seconds.
BEAT = 5.0
SILENT = 60.0
# Slurm can start a job again while the processes of its last start still end.
SAME_JOB = 300.0


@dataclass(frozen=True)
class Holder:
    """The contents of the lock.

    Attributes:
        place: see `process_place`.
        born: the start time of the process; process numbers repeat.
        stepped: whether this start of the run has done an optimizer step.
        ended: whether it has ended with an error.
    """

    node: str
    place: str
    process: int
    born: str
    job: str
    since: str
    token: str
    stepped: bool = False
    ended: bool = False

    @staticmethod
    def of_this_process() -> Holder:
        process, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        born = _born(process)
        return Holder(node_name(), process_place(), process, born, job_name(), since, secrets.token_hex(8))

    def __str__(self) -> str:
        of_job = f"job {self.job}, " if self.job else ""
        return f"{of_job}process {self.process} on {self.node}, since {self.since}"


class _Seen(NamedTuple):
    """A lock as it was found: its holder, None if it cannot be read, and its last touch."""

    holder: Holder | None
    touched: float

    def is_over(self, now: float) -> bool:
        holder = self.holder
        if holder is not None and (holder.ended or _is_gone(holder)):
            return True
        return now - self.touched > SILENT

    def lives(self, first: _Seen) -> bool:
        holder = self.holder
        if holder is not None and holder.place == process_place():
            return True
        return self.touched > first.touched


class RunLock:
    """The held lock of a folder.

    Raises:
        MobiusError: another run holds it; the message names it. Or the lock cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._own = folder / FILE, Holder.of_this_process()
        self._over = threading.Event()
        try:
            self._acquire()
        except OSError as error:
            raise MobiusError(
                f"cannot write to {folder}: {error.strerror or error}: choose another output_dir"
            ) from error
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def note_step(self) -> None:
        """Record that this start of the run has done an optimizer step."""
        if not self._own.stepped:
            self._own = replace(self._own, stepped=True)
            self._write()

    def release(self, failed: bool) -> None:
        """Remove the lock; after a failure it stays, for `last_start`."""
        self._over.set()
        self._thread.join()
        if failed:
            self._own = replace(self._own, ended=True)
            self._write()
        else:
            with suppress(OSError):
                self._path.unlink()

    def _acquire(self) -> None:
        first, started, waits = None, time.monotonic(), False
        while not self._create():
            seen = _look(self._path)
            if seen is None:
                continue
            first = first or seen
            # The last touch lies in the future if a clock was set back since.
            silent = seen.touched == first.touched and time.monotonic() - started > SILENT
            if silent or seen.is_over(_clock(self._path)):
                _displace(self._path, seen)
            elif seen.lives(first):
                same = seen.holder is not None and self._own.job != "" and seen.holder.job == self._own.job
                if not same or time.monotonic() - started > SAME_JOB:
                    raise MobiusError(
                        f"another run is in {self._path.parent} ({seen.holder or 'unknown'}): choose another"
                        " output_dir, or wait until it has ended"
                    )
                time.sleep(1)
            else:
                if not waits:
                    print(
                        f"waiting for a sign of the run in {self._path.parent} ({seen.holder or 'unknown'})", flush=True
                    )
                waits = True
                time.sleep(0.5)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self._own)))
        except OSError:
            self._path.unlink()
            raise
        return True

    def _write(self) -> None:
        # On a full disk only `last_start` knows less.
        with suppress(OSError):
            replace_file(self._path, json.dumps(asdict(self._own)))

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            # A file server that is away for a moment costs a touch.
            with suppress(OSError):
                seen = _look(self._path)
                if seen is None:
                    self._write()
                elif seen.holder is not None and seen.holder.token != self._own.token:
                    self._end(seen.holder)
                else:
                    os.utime(self._path, follow_symlinks=False)

    def _end(self, other: Holder) -> None:
        """End a run that was silent for so long, suspended for example, that another has taken its folder."""
        print(f"error: another run has taken over {self._path.parent} ({other})", file=sys.stderr, flush=True)
        os._exit(1)


def last_start(folder: Path) -> Holder | None:
    """Return the holder of the lock that a failed or killed start left; None if there is none."""
    try:
        seen = _look(folder / FILE)
    except OSError:
        return None
    return None if seen is None else seen.holder


def _look(path: Path) -> _Seen | None:
    try:
        with open_regular(path) as file:
            touched = os.fstat(file.fileno()).st_mtime
            text = file.read(2**16)
    except FileNotFoundError:
        if path.is_symlink():
            raise
        return None
    try:
        values = json.loads(text)
        holder = Holder(**values)
        known = all(isinstance(value, type(getattr(_EXAMPLE, name))) for name, value in values.items())
    except (ValueError, TypeError, RecursionError):
        return _Seen(None, touched)
    return _Seen(holder if known else None, touched)


_EXAMPLE = Holder("", "", 0, "", "", "", "")


def _displace(path: Path, seen: _Seen) -> None:
    """Remove the lock of a holder that is over. If another has taken it meanwhile, give it back."""
    moved = temporary_of(path)
    try:
        path.rename(moved)
        now = _look(moved)
        if now is not None and now.holder != seen.holder:
            with suppress(FileExistsError):
                os.link(moved, path)
        moved.unlink()
    except FileNotFoundError:
        return


def _clock(path: Path) -> float:
    """Return the time of the file system, which another node's clock may not have."""
    probe = temporary_of(path)
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _is_gone(holder: Holder) -> bool:
    if holder.place != process_place():
        return False
    return not process_lives(holder.process) or _born(holder.process) != holder.born


def _born(process: int) -> str:
    """Return the start time of a process in clock ticks; an empty text where the system does not tell it."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]  # a zombie is over
