"""Remote shards: fetched once, then read from the local disk.

fsspec opens the addresses: http, https, s3, gs, hf, file and its other schemes. No shell or other program is started.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from fsspec import get_filesystem_class
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from mobius_train.data.patterns import expand_braces
from mobius_train.data.shards import INDEX, MAX_INDEX_BYTES, Shard, check_whole, listed_shard
from mobius_train.data.verified import remember_verified
from mobius_train.errors import MobiusError, without_secrets
from mobius_train.files import publish, remove_killed, sha256

logger = logging.getLogger(__name__)

HTTP = ("http", "https")
ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt; doubles with each attempt
SILENCE = 60.0  # seconds without data after which an HTTP connection is considered broken
SLOWEST = 1024.0  # bytes per second, over SILENCE, below which a connection is considered broken
RESERVE = 2**30  # bytes of the local disk that a file of unknown size leaves free
# HTTP statuses from 400 to 499 that are worth a retry: timeout, too many requests.
PASSING = (408, 429)
# Errors of the local disk that a retry cannot fix.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Remote(NamedTuple):
    """A shard's address and its local path."""

    url: str
    path: Path

    def __str__(self) -> str:
        """The address without credentials and signatures."""
        return without_secrets(self.url)

    @property
    def index_file(self) -> Remote | None:
        """The index.json in the shard's folder; None for a signed address, whose signature covers only the shard."""
        if urlparse(self.url).query:
            return None
        return Remote(f"{_parent(self.url)}/{INDEX}", self.path.with_name(INDEX))


def remote_shards(source: str, folder: Path) -> list[Remote]:
    """The shards of an address with braces. Nothing is fetched yet.

    Args:
        folder: the local folder for them.

    Raises:
        MobiusError: fsspec cannot open an address here, or an address occurs more than once.
    """
    shards = [_remote(url.strip(), folder) for url in expand_braces(source)]
    places: set[Path] = set()
    for shard in shards:
        if shard.path in places:
            raise MobiusError(f"{shard} occurs more than once: give each shard once")
        places.add(shard.path)
    return shards


def _remote(url: str, folder: Path) -> Remote:
    remote = Remote(url, folder / _local_name(url))
    scheme, separator, _ = url.lower().partition("://")
    if scheme.startswith("pipe:"):
        raise MobiusError(
            "pipe: addresses are not supported because they run shell commands; nothing was run or fetched. Fetch the"
            " shards first and give their paths, or give URLs that fsspec opens (https, s3, gs, hf)"
        )
    if not separator:
        raise MobiusError(f"{str(remote)!r} has no scheme://; nothing was fetched. Give only addresses or only paths")
    if re.search(r"[*\[\]]|::", url):
        raise MobiusError(
            f"{remote}: globs and chained addresses are not supported; list shards with braces, {{000000..000003}}"
        )
    try:
        get_filesystem_class(scheme)
    except ValueError as error:
        raise MobiusError(f"{remote}: fsspec cannot open {scheme}:// addresses. Fetch the shards first") from error
    except ImportError as error:
        package = "pip install 'mobius-train[remote]'" if scheme in HTTP else error
        raise MobiusError(f"{remote}: a package for {scheme}:// is missing: {package}") from error
    return remote


def _local_name(url: str) -> str:
    """A unique local path for an address. Addresses of one remote folder, with its index.json, share a folder."""
    parts = urlparse(url)
    name = unquote(parts.path.rpartition("/")[2])
    if parts.query or not re.fullmatch(r"[^./\0][^/\0]{0,150}", name):
        name = f"{_digest(url)}.tar"
    return f"{parts.scheme}-{re.sub('[^A-Za-z0-9.-]', '', parts.hostname or '')}-{_digest(_parent(url))}/{name}"


def _parent(url: str) -> str:
    return url.rpartition("/")[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fetch_index(shard: Remote) -> str | None:
    """Fetch the index.json next to a shard unless it is already local; return the reason if there is none.

    Raises:
        MobiusError: the server cannot be reached.
    """
    if shard.index_file is None:
        return f"{shard} is signed, and its signature does not cover an index.json"
    if shard.index_file.path.exists():
        return None
    try:
        fetch_file(shard.index_file, lambda path: None, most=MAX_INDEX_BYTES)
    except _Refused as error:
        return str(error)
    return None


def fetch_shard(shard: Remote, progress: Callable[[int], object] = lambda count: None) -> None:
    """Fetch a shard. It gets its name only when it is complete and matches its index.json, if there is one.

    Args:
        progress: called with the number of bytes received since the last call; negative when an attempt is discarded.

    Raises:
        MobiusError: the shard cannot be fetched, or the received file is incomplete; names the address.
    """
    expected = listed_shard(shard.path)

    def check(file: Path) -> None:
        if expected is not None:
            received = Shard(file.stat().st_size, sha256(file), expected.samples)
            if received != expected:
                raise MobiusError(
                    f"{shard} has {received.bytes} bytes with sha256 {received.sha256[:12]}…, but its {INDEX} lists"
                    f" {expected.bytes} bytes with {expected.sha256[:12]}…: restart, or repair the remote shard. If the"
                    f" shards were changed on purpose, delete {shard.path.parent}"
                )
        try:
            check_whole(file)
        except MobiusError as error:
            raise MobiusError(f"{shard} is not a complete shard: {error}") from error

    fetch_file(shard, check, progress, None if expected is None else expected.bytes)
    if expected is not None:
        remember_verified(shard.path, expected.sha256)


class _Refused(MobiusError):
    """The server responded without the file: it does not exist, or access is denied."""


class TooLarge(Exception):
    """More bytes arrive than the file can have."""


class _Arrived(Callback):
    """Reports the bytes received in one attempt, and ends an attempt that is endless.

    Args:
        most: bytes that the file can have.
    """

    def __init__(self, progress: Callable[[int], object], most: int) -> None:
        super().__init__()
        self._progress, self._most, self.reported = progress, most, 0
        self._since, self._at_that_time = time.monotonic(), 0

    def call(self, *_: Any, **__: Any) -> None:
        self._progress(self.value - self.reported)
        self.reported = self.value
        if self.value > self._most:
            raise TooLarge(f"the server sends more than {self._most} bytes")
        seconds = time.monotonic() - self._since
        if seconds >= SILENCE:
            if self.value - self._at_that_time < SLOWEST * seconds:
                raise ConnectionError(f"less than {SLOWEST:g} bytes per second arrived in {seconds:.0f} s")
            self._since, self._at_that_time = time.monotonic(), self.value


def fetch_file(
    remote: Remote,
    check: Callable[[Path], object],
    progress: Callable[[int], object] = lambda count: None,
    most: int | None = None,
) -> None:
    """Fetch a file. It gets its name once it is complete, synced to disk, and has passed `check`.

    Args:
        most: bytes that it can have; by default those for which the disk has room.

    Raises:
        MobiusError: it cannot be fetched or written; or any error of `check`.
    """

    def write(temporary: Path) -> None:
        # Fail here if the local disk rejects the file, so that it is not mistaken for a server error.
        temporary.touch()
        room = max(0, shutil.disk_usage(temporary.parent).free - RESERVE)
        _receive(remote, temporary, progress, room if most is None else most)
        check(temporary)

    try:
        remove_killed(remote.path.parent)
        publish(remote.path, write)
    except OSError as error:
        raise MobiusError(f"cannot write {remote} to {remote.path.parent}: {error}") from error


def _receive(remote: Remote, file: Path, progress: Callable[[int], object], most: int) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        arrived = _Arrived(progress, most)
        try:
            system, path = url_to_fs(remote.url, **_options(remote.url))
            system.get_file(path, str(file), callback=arrived)
            return
        # Each file system has its own errors. They are not chained, because their texts contain signatures.
        except Exception as error:
            progress(-arrived.reported)
            message = f"cannot fetch {remote}: {_reason(remote, error)}"
            status = getattr(error, "status", None)
            refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING
            if refused or isinstance(error, FileNotFoundError | PermissionError):
                raise _Refused(message) from None
            message += f" (attempt {attempt} of {ATTEMPTS})"
            if attempt == ATTEMPTS or isinstance(error, TooLarge) or getattr(error, "errno", None) in FULL:
                raise MobiusError(message) from None
        logger.warning(message)
        time.sleep(PAUSE * 2 ** (attempt - 1))


def _options(url: str) -> dict[str, Any]:
    if urlparse(url).scheme not in HTTP:
        return {}
    from aiohttp import ClientTimeout  # part of the extra `remote`

    # aiohttp's default limit of 5 minutes per file is too short for a shard. Proxies come from the environment. The
    # address is sent unchanged, because a signature may cover it.
    timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": True}


def _reason(remote: Remote, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = without_secrets(f"{type(error).__name__}: {error}")
    parts = urlparse(remote.url)
    for secret in filter(None, (parts.query, parts.password)):
        text = text.replace(secret, "…")
    return text
