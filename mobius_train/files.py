"""Atomic writing of files and folders, and reading with limits. What is written stays consistent if the process is
killed or the power fails.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mobius_train.errors import MobiusError

# Bytes. Hashing and writing in parts releases the interpreter to the training thread.
PART = 16 * 2**20
# Bytes. More than any configuration has that people or models bring.
SMALL = 64 * 2**20
# Permissions that the user gives to new files. The safetensors library writes files that only their owner can read.
_UMASK = os.umask(0)
os.umask(_UMASK)
# Prefix of temporary names, followed by the node, the process, a mark and the final name.
TEMPORARY = ".tmp-"
# Of the process. Process numbers repeat: in other containers of the same name, and after a restart.
_TOKEN, _COUNT = secrets.token_hex(4), itertools.count()
_MARKED = re.compile(r"(?P<process>\d+)-(?:(?P<place>[0-9a-f]{8})\.(?P<token>[0-9a-f]{8})\.\d+-)?")
# Seconds. Nobody writes for a day without touching what is written.
_LONG = 24 * 3600
# linux/fs.h: renameat2 swaps two paths.
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@dataclass(frozen=True)
class File:
    """Size and hash of a written file."""

    bytes: int
    sha256: str


def write_file(path: Path, contents: Sequence[bytes | memoryview]) -> File:
    """Write and sync a file. What has its name is removed first, and a link is not followed.

    Raises:
        OSError: writing failed, for example on a full disk.
    """
    digest, size = hashlib.sha256(), 0
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb", buffering=0) as file:
        for content in contents:
            view = memoryview(content)
            for start in range(0, len(view), PART):
                part = view[start : start + PART]
                digest.update(part)
                size += len(part)
                while part:
                    # A write to a disk that is almost full can be partial.
                    part = part[file.write(part) :]
        os.fsync(file.fileno())
    return File(size, digest.hexdigest())


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk.

    Raises:
        OSError: flushing failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises:
        OSError: the file cannot be read, or is a pipe, a device, a socket or a folder, which could block for ever.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_small(path: Path, most: int = SMALL) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        OSError: the file cannot be read, is larger, or is a pipe, a device, a socket or a folder.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes; the limit is {most}", str(path))
        return file.read()


def read_small_json(path: Path) -> Any:
    """
    Raises:
        OSError: see `read_small`.
        ValueError: the file is not UTF-8 or JSON, or is nested too deeply.
    """
    return decode_json(read_small(path))


def decode_json(content: bytes) -> Any:
    """
    Raises:
        ValueError: the content is not UTF-8 or JSON, or is nested too deeply.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_of(path: Path) -> Path:
    """Return a new temporary path in the folder of `path`. Nobody else has or can guess its name."""
    return path.with_name(f"{_own_prefix()}{os.getpid()}-{process_place()}.{_TOKEN}.{next(_COUNT)}-{path.name}")


def _own_prefix() -> str:
    return f"{TEMPORARY}{os.uname().nodename}-"


@lru_cache(maxsize=1)
def process_place() -> str:
    """Return a mark of this start of the system and this container, in which process numbers are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        return "0" * 8
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:8]


def remove_killed(folder: Path) -> None:
    """Remove temporary files and folders in `folder`, not below it, of this node's ended processes."""
    for path in folder.glob(f"{glob.escape(_own_prefix())}*"):
        # Others do not match: a node with a longer name.
        name = _MARKED.match(path.name.removeprefix(_own_prefix()))
        if name is not None and _is_over(path, int(name["process"]), name["place"], name["token"]):
            remove_any(path)


def _is_over(path: Path, process: int, place: str | None, token: str | None) -> bool:
    if place not in (None, process_place()):
        # Its process cannot be looked up from here.
        with suppress(OSError):
            return time.time() - path.lstat().st_mtime > _LONG
        return False
    if process == os.getpid():
        return token != _TOKEN
    return not process_lives(process)


def process_lives(process: int) -> bool:
    """True if a process of this number exists on this node."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove every temporary file and folder in a tree. No process may still write to it."""
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        remove_any(path)


def remove_any(path: Path) -> None:
    """Remove a file, a link or a folder, ignoring errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def finished_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield temporary paths, which are renamed to `paths` at the end, after all files are flushed to the disk.

    After an error no file is renamed, and the temporary files are removed.

    Raises:
        OSError: a file cannot be written.
    """
    temporaries = [temporary_of(path) for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            _permit(temporary)
            sync(temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        sync(folder)


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` create a file under a temporary name, flush it to the disk, then rename it to `path`.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with finished_files([path]) as [temporary]:
        write(temporary)


def replace_file(path: Path, text: str) -> None:
    """Replace a small file atomically: readers see either the old or the new contents.

    Raises:
        OSError: the file cannot be written.
    """
    publish(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def json_pieces(values: Iterable[Any]) -> Iterator[str]:
    """Yield `json.dumps(list(values))` in pieces, for lists that are too long for one text."""
    yield "["
    for number, value in enumerate(values):
        yield f"{', ' if number else ''}{json.dumps(value)}"
    yield "]"


def publish_lines(path: Path, records: Iterable[Any], ascii_only: bool = False) -> None:
    """Publish a file of one JSON text per line.

    Raises:
        OSError: the file cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=ascii_only) + "\n")

    publish(path, write)


def read_lines(path: Path) -> Iterator[Any]:
    """Yield the records that `publish_lines` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not JSON.
    """
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def check_output_folder(folder: Path, overwrite: bool = False) -> None:
    """Refuse an output folder that is not empty. Nothing is created or deleted.

    Raises:
        MobiusError: the path is a file, or a folder that is not empty and `overwrite` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise MobiusError(f"the output folder {folder} is a file: choose another path")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise MobiusError(f"the output folder {folder} is not empty: choose another one, or add --overwrite")


def check_writable(path: Path, file: bool = False) -> None:
    """Check before expensive work that a folder, or a file, can be written at `path`. Leaves nothing.

    Raises:
        MobiusError: it cannot; names the folder that does not allow it.
    """
    present = path
    try:
        if file and path.is_dir():
            raise MobiusError(f"cannot write the file {path}: it is a folder. Choose another path")
        present = next(p for p in (path.parent if file else path, *path.parents) if p.exists())
        # Access rights alone do not tell: a mount can be read-only.
        probe = temporary_of(present / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MobiusError(f"cannot write {path}: {present}: {error.strerror}. Choose another path") from error


@contextmanager
def temporary_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder for the contents of `destination`; if it is not published, it is removed."""
    remove_killed(destination.parent)
    temporary = temporary_of(destination)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, destination: Path, replace: bool = False) -> None:
    """Flush a folder and all its files to the disk, then rename it to `destination`.

    Args:
        replace: swap the folder with an existing destination, which is then removed. Where the file system cannot swap,
            the destination is moved away first, and has no folder for an instant.

    Raises:
        OSError: renaming failed, for example because `destination` is not empty and `replace` is false.
    """
    for folder, _, names in os.walk(temporary):
        for path in (Path(folder, name) for name in names):
            if path.is_file():
                _permit(path)
                sync(path)
        sync(Path(folder))
    old = None
    if replace and os.path.lexists(destination):
        old = temporary if _swap(temporary, destination) else _moved_away(destination)
    if old is not temporary:
        temporary.rename(destination)
    sync(destination.parent)
    if old is not None:
        remove_any(old)


def _swap(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; return False if the system or the file system cannot do this."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    return bool(function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _permit(path: Path) -> None:
    """Give a file the permissions that the umask allows."""
    path.chmod(path.stat().st_mode | 0o666 & ~_UMASK)


def remove_folder(folder: Path) -> None:
    """Remove a folder. If the process is killed meanwhile, no partial folder keeps its name.

    Raises:
        OSError: the folder cannot be removed.
    """
    moved = _moved_away(folder)
    if moved.is_symlink():
        moved.unlink()
    else:
        shutil.rmtree(moved)


def _moved_away(folder: Path) -> Path:
    old = folder.with_name(f".{folder.name}.old.tmp")
    remove_any(old)
    return folder.rename(old)


@contextmanager
def finished_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `destination` at the end; after an error it is removed.

    Raises:
        MobiusError: the destination is not empty and `overwrite` is false, or it cannot be written.
    """
    check_output_folder(destination, overwrite)
    try:
        with temporary_folder(destination) as temporary:
            yield temporary
            publish_folder(temporary, destination, replace=True)
    except OSError as error:
        raise MobiusError(f"cannot write {error.filename or destination}: {error.strerror or error}") from error
