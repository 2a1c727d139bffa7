"""Shards that lie elsewhere, named by addresses: fetched once, and then read from a disk like any others.

fsspec opens the addresses: http, https, s3, gs, hf, file and what else it knows. No shell or other program is started.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from fsspec import get_filesystem_class
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from mobius_train.data.patterns import expand, without_secrets
from mobius_train.data.shards import INDEX, Shard, check_whole, listed
from mobius_train.errors import MobiusError
from mobius_train.files import publish, remove_killed, sha256

logger = logging.getLogger(__name__)

HTTP = ("http", "https")
ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt; every further pause is twice as long
SILENCE = 60.0  # seconds without a byte after which an HTTP connection counts as broken
# HTTP statuses of 400 to 499 that another attempt may not meet: a timeout, and too many requests.
PASSING = (408, 429)
# Errors of the disk here, which stay.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Remote(NamedTuple):
    """A shard's address, and where it lies once it is fetched."""

    url: str
    path: Path

    def __str__(self) -> str:
        """The address without credentials and signatures."""
        return without_secrets(self.url)

    @property
    def index_file(self) -> Remote | None:
        """The index.json in the same place; None where a signature opens the shard alone."""
        if urlparse(self.url).query:
            return None
        return Remote(f"{_parent(self.url)}/{INDEX}", self.path.with_name(INDEX))


def remote_shards(source: str, folder: Path) -> list[Remote]:
    """The shards that addresses name, by braces. Nothing is fetched yet.

    Args:
        folder: where they are to lie.

    Raises:
        MobiusError: an address is one that fsspec cannot open here, or occurs more than once.
    """
    shards = [_remote(url.strip(), folder) for url in expand(source)]
    places: set[Path] = set()
    for shard in shards:
        if shard.path in places:
            raise MobiusError(f"{shard} is named more than once: name each shard once")
        places.add(shard.path)
    return shards


def _remote(url: str, folder: Path) -> Remote:
    remote = Remote(url, folder / _local_name(url))
    scheme, separator, _ = url.lower().partition("://")
    if scheme.startswith("pipe:"):
        raise MobiusError(
            "pipe: addresses are not supported, since they run commands in a shell; nothing was run or fetched. Fetch"
            " the shards beforehand and give their paths, or give URLs that fsspec opens (https, s3, gs, hf)"
        )
    if not separator:
        raise MobiusError(
            f"{str(remote)!r} has no scheme://; nothing was fetched. Give addresses alone, or paths alone"
        )
    if re.search(r"[*\[\]]|::", url):
        raise MobiusError(
            f"{remote}: addresses cannot be searched or chained; name shards by braces, {{000000..000003}}"
        )
    try:
        get_filesystem_class(scheme)
    except ValueError as error:
        raise MobiusError(f"{remote}: fsspec opens no {scheme}:// addresses. Fetch the shards beforehand") from error
    except ImportError as error:
        package = "pip install 'mobius-train[remote]'" if scheme in HTTP else error
        raise MobiusError(f"{remote}: a package for {scheme}:// is missing: {package}") from error
    return remote


def _local_name(url: str) -> str:
    """A name for each address; those of one place share a folder, where its index.json lies too."""
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
    """Fetch the index.json beside a shard, unless it is here; returns the reason where there is none.

    Raises:
        MobiusError: the server cannot be reached.
    """
    if shard.index_file is None:
        return f"{shard} is signed, and its signature opens no index.json"
    if shard.index_file.path.exists():
        return None
    try:
        fetch(shard.index_file, lambda path: None)
    except _Refused as error:
        return str(error)
    return None


def fetch_shard(shard: Remote, progress: Callable[[int], object] = lambda count: None) -> None:
    """Fetch a shard: its name appears when it is complete, and as the index.json beside it says, if there is one.

    Args:
        progress: called with the number of bytes that arrived, each time some have; negative where they are dropped.

    Raises:
        MobiusError: naming the address: it cannot be fetched, or what arrived is not the whole shard.
    """
    expected = listed(shard.path)

    def check(file: Path) -> None:
        if expected is not None:
            found = Shard(file.stat().st_size, sha256(file), expected.samples)
            if found != expected:
                raise MobiusError(
                    f"{shard} gave {found.bytes} bytes of sha256 {found.sha256[:12]}…, but the {INDEX} in its place"
                    f" says {expected.bytes} bytes of {expected.sha256[:12]}…: start again, or repair it there. If the"
                    f" shards were changed on purpose, delete {shard.path.parent}"
                )
        try:
            check_whole(file)
        except MobiusError as error:
            raise MobiusError(f"{shard} gave no whole shard: {error}") from error

    fetch(shard, check, progress)


class _Refused(MobiusError):
    """The server was reached and gave no file: there is none, or it may not be read."""


class _Arrived(Callback):
    """Reports the bytes of one attempt."""

    def __init__(self, progress: Callable[[int], object]) -> None:
        super().__init__()
        self._progress, self._reported = progress, 0

    def call(self, *_: Any, **__: Any) -> None:
        self._progress(self.value - self._reported)
        self._reported = self.value


def fetch(
    remote: Remote, check: Callable[[Path], object], progress: Callable[[int], object] = lambda count: None
) -> None:
    """Fetch a file; it gets its name when all of it has arrived, is on the disk, and has passed the check.

    Raises:
        MobiusError: it cannot be fetched, or written here; or what `check` raises.
    """

    def write(temporary: Path) -> None:
        # If this disk refuses a file, that is not the server's refusal.
        temporary.touch()
        _receive(remote, temporary, progress)
        check(temporary)

    try:
        remove_killed(remote.path.parent)
        publish(remote.path, write)
    except OSError as error:
        raise MobiusError(f"{remote} cannot be written to {remote.path.parent}: {error}") from error


def _receive(remote: Remote, file: Path, progress: Callable[[int], object]) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        arrived = _Arrived(progress)
        try:
            system, path = url_to_fs(remote.url, **_options(remote.url))
            system.get_file(path, str(file), callback=arrived)
            return
        # Every file system has errors of its own. They are not named as causes, since their texts hold signatures.
        except Exception as error:
            arrived.absolute_update(0)
            message = f"{remote} cannot be fetched: {_reason(remote, error)}"
            status = getattr(error, "status", None)
            refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING
            if refused or isinstance(error, FileNotFoundError | PermissionError):
                raise _Refused(message) from None
            message += f" (attempt {attempt} of {ATTEMPTS})"
            if attempt == ATTEMPTS or getattr(error, "errno", None) in FULL:
                raise MobiusError(message) from None
        logger.warning(message)
        time.sleep(PAUSE * 2 ** (attempt - 1))


def _options(url: str) -> dict[str, Any]:
    if urlparse(url).scheme not in HTTP:
        return {}
    from aiohttp import ClientTimeout  # a package of the extra `remote`

    # aiohttp's own limit of 5 minutes a file is too short for a shard. The proxies are those of the environment, and
    # the address is sent letter by letter, since a signature may cover it.
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
