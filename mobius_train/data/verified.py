"""Verification of large files by their hash, once per file and machine.

A record in the user's cache folder lists the verified files by path, size and times, so that later starts and the other
ranks of a machine do not read them again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mobius_train.bars import progress
from mobius_train.files import sha256

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/mobius-train/verified")
RECORDED_BYTES = 2**26  # hashing a smaller file takes a fraction of a second: it is not recorded
THREADS = 4


def differing_files(hashes: Mapping[Path, str]) -> list[Path]:
    """The files whose SHA-256 is not the given one.

    Raises:
        OSError: a file cannot be read.
    """
    large = {path for path in hashes if path.stat().st_size >= RECORDED_BYTES}
    differing = _hashed({path: hashes[path] for path in hashes if path not in large})
    if large:
        # The other ranks of this machine wait for the lock, and find the record.
        with _locked_record() as record:
            known = set(record.read().splitlines()) if record else set()
            states = {path: _state(path, hashes[path]) for path in large}
            unknown = {path: hashes[path] for path in hashes if path in large and states[path] not in known}
            wrong = _hashed(unknown)
            if record:
                record.writelines(f"{states[path]}\n" for path in unknown if path not in wrong)
            differing += wrong
    return differing


def remember_verified(path: Path, digest: str) -> None:
    """Record that a file has this SHA-256."""
    if path.stat().st_size >= RECORDED_BYTES:
        with _locked_record() as record:
            if record:
                record.seek(0, os.SEEK_END)
                record.write(f"{_state(path, digest)}\n")


def _hashed(hashes: Mapping[Path, str]) -> list[Path]:
    paths = list(hashes)
    many = sum(path.stat().st_size for path in paths) >= 2**30
    with ThreadPoolExecutor(THREADS) as pool:
        found = progress(pool.map(sha256, paths), desc="verifying", total=len(paths), unit="file", disable=not many)
        return [path for path, digest in zip(paths, found, strict=True) if digest != hashes[path]]


def _state(path: Path, digest: str) -> str:
    status = path.stat()
    return json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest])


@contextmanager
def _locked_record() -> Iterator[IO[str] | None]:
    """The record of this machine, locked; None if the cache folder cannot be written."""
    try:
        path = CACHE.expanduser() / f"{os.uname().nodename}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = path.open("a+", encoding="utf-8")
        fcntl.flock(record, fcntl.LOCK_EX)
        record.seek(0)
    except (OSError, RuntimeError) as error:  # no home folder
        logger.warning("cannot record verified files in %s, so each start verifies them again: %s", CACHE, error)
        yield None
        return
    with record:
        yield record
