"""Shards that lie elsewhere, named by addresses: fetched once, and read from a disk like any others.

webdataset's openers fetch: curl for http, https, ftps, sftp and hf, gsutil for gs, ais for AIStore. Each starts its
program with a list of arguments. `pipe:` alone hands its text to a shell, and is refused unless the user allows that.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlparse

from webdataset.gopen import gopen, gopen_schemes, rewrite_url

from mobius_train.data.patterns import SCHEME, expand
from mobius_train.data.shards import INDEX, Shard, check_whole, listed
from mobius_train.errors import MobiusError
from mobius_train.files import sync_folder

CHUNK = 2**20  # bytes
STALE = 24 * 3600  # seconds without a byte after which nobody writes a file any more
REFUSED = 22
# What curl's exit statuses mean, of those that people meet; curl itself is told to be silent.
CURL = {
    3: "the address is malformed",
    6: "the host's name is unknown",
    7: "no connection to the host",
    18: "the transfer ended before the end",
    REFUSED: "the server refused: not found or not allowed, say",
    28: "no answer in time",
    35: "no TLS connection",
    56: "the connection broke",
    60: "the host's certificate is not trusted",
}


class Remote(NamedTuple):
    """A shard's address, and where it lies once it is fetched."""

    url: str
    path: Path

    def __str__(self) -> str:
        """The address without what gives access to it: credentials and signatures."""
        if self.url.startswith("pipe:"):
            return self.url
        parts = urlparse(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()

    @property
    def index_file(self) -> Remote | None:
        """The index.json beside it; None where an address does not say where that is."""
        if self.url.startswith("pipe:") or urlparse(self.url).query:
            return None
        return Remote(f"{_parent(self.url)}/{INDEX}", self.path.with_name(INDEX))


def remote_shards(source: str, folder: Path, allow_shell_commands: bool) -> list[Remote]:
    """The shards that addresses name, by braces; nothing is asked for yet.

    Args:
        folder: where they are to lie.

    Raises:
        MobiusError: an address would run a command in a shell, is of no kind that webdataset opens, or repeated.
    """
    shards = [_remote(url.strip(), source, folder, allow_shell_commands) for url in expand(source)]
    if len({shard.path for shard in shards}) < len(shards):
        raise MobiusError(f"{source!r} names a shard more than once")
    return shards


def _remote(url: str, source: str, folder: Path, allow_shell_commands: bool) -> Remote:
    # GOPEN_REWRITE of the environment may make another kind of it.
    schemes = {_scheme(one, source) for one in (url, rewrite_url(url))}
    if "pipe" in schemes and not allow_shell_commands:
        raise MobiusError(
            f"{source!r} would run a shell command; nothing was run or fetched. If you know where this recipe comes"
            " from, allow it by data.allow_shell_commands=true"
        )
    for scheme in schemes:
        if scheme not in gopen_schemes:
            hint = f"pipe:aws s3 cp {url} -, with data.allow_shell_commands=true" if scheme == "s3" else "pipe:COMMAND"
            raise MobiusError(
                f"{source!r}: webdataset has no opener for {scheme or 'paths'}; nothing was run or fetched. There are"
                f" {', '.join(sorted(gopen_schemes.keys() - {'__default__'}))}; or give {hint}"
            )
    if "pipe" not in schemes and re.search(r"[*\[\]]", url):
        raise MobiusError(f"{source!r}: addresses cannot be searched, name shards by braces, {{000000..000003}}")
    return Remote(url, folder / _local_name(url))


def _scheme(url: str, source: str) -> str:
    if not SCHEME.match(url) or url.lower().startswith("file:"):
        raise MobiusError(f"{source!r} mixes paths and addresses; nothing was run or fetched. A path has no scheme")
    return urlparse(url).scheme


def _local_name(url: str) -> str:
    """Another one for every address; index.json can lie beside those of one place."""
    if url.startswith("pipe:"):
        return f"pipe/{_digest(url)}.tar"
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
    """Fetch the index.json beside a shard, unless it is here; returns why there is none, where there is none.

    Raises:
        MobiusError: the place cannot be reached.
    """
    if shard.index_file is None:
        return f"{shard} does not say where one would be"
    if shard.index_file.path.exists():
        return None
    try:
        fetch(shard.index_file, lambda path: None)
    except _NotThere as error:
        return str(error)
    return None


def fetch_shard(shard: Remote, progress: Callable[[int], object] = lambda count: None) -> None:
    """Fetch a shard: its name appears when it is whole, and what the index.json beside it says, if there is one.

    Args:
        progress: called with the bytes that have come, each time some have.

    Raises:
        MobiusError: naming the address: it cannot be fetched, or what came is not whole.
    """
    expected = listed(shard.path)

    def check(came: Path) -> None:
        if expected is not None:
            with came.open("rb") as file:
                found = Shard(came.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest(), expected.samples)
            if found != expected:
                raise MobiusError(
                    f"{shard} gave {found.bytes} bytes of sha256 {found.sha256[:12]}…, but {INDEX} beside it says"
                    f" {expected.bytes} bytes of {expected.sha256[:12]}…: start again, or mend it there; if it was"
                    f" meant to change, delete {shard.path.parent}"
                )
        try:
            check_whole(came)
        except MobiusError as error:
            raise MobiusError(f"{shard} gave no whole shard: {error}") from error

    fetch(shard, check, progress)


class _NotThere(MobiusError):
    """The server, or its program, was reached and said no."""


def fetch(
    remote: Remote, check: Callable[[Path], object], progress: Callable[[int], object] = lambda count: None
) -> None:
    """Fetch a file; it gets its name when all of it has come, is on the disk, and has passed the check."""
    folder, name = remote.path.parent, remote.path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{name}.*.tmp"):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink(missing_ok=True)
        # Another job may fetch the same.
        temporary = folder / f".{name}.{socket.gethostname()}-{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as file:
                _receive(remote, file, progress)
                file.flush()
                os.fsync(file.fileno())
            check(temporary)
            temporary.replace(remote.path)
            sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MobiusError(f"{remote} cannot be put into {folder}: {error}") from error


def _receive(remote: Remote, file: IO[bytes], progress: Callable[[int], object]) -> None:
    process: Any = None
    error: Exception | None = None
    try:
        stream = gopen(remote.url)
        process = getattr(stream, "proc", None)
        while chunk := stream.read(CHUNK):
            file.write(chunk)
            progress(len(chunk))
        stream.close()
    except Exception as raised:  # what openers raise is not one family
        error = raised
    # The program is asked itself: webdataset lets some statuses pass.
    status = process.poll() if process is not None else None
    if status:
        program = _program(process.args)
        reason = f"{program} ended with {status}"
        if program == "curl" and status in CURL:
            reason += f", {CURL[status]}"
        unreachable = program == "curl" and status != REFUSED
        raise (MobiusError if unreachable else _NotThere)(f"{remote} cannot be fetched: {reason}")
    if error is not None:
        raise MobiusError(f"{remote} cannot be fetched: {error}") from error


def _program(arguments: Sequence[str] | str) -> str:
    return "its command" if isinstance(arguments, str) else Path(arguments[0]).name
