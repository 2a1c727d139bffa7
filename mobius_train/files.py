"""Atomic writing of files and folders, which stay consistent if the process is killed or the power fails."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobius_train.errors import MobiusError

# Bytes. Hashing and writing in parts releases the interpreter to the training thread.
PART = 16 * 2**20
# Permissions that the user gives to new files. The safetensors library writes files that only their owner can read.
_UMASK = os.umask(0)
os.umask(_UMASK)
# Prefix of temporary names, followed by the node, the process and the final name.
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class File:
    """Size and hash of a written file."""

    bytes: int
    sha256: str


def write_file(path: Path, contents: Sequence[bytes | memoryview]) -> File:
    """Write and sync a file.

    Raises:
        OSError: writing failed, for example on a full disk.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_of(path: Path) -> Path:
    """Return a temporary path in the folder of `path`, unique to this process on this node."""
    return path.with_name(f"{_own_prefix()}{os.getpid()}-{path.name}")


def _own_prefix() -> str:
    return f"{TEMPORARY}{os.uname().nodename}-"


def remove_killed(folder: Path) -> None:
    """Remove temporary files and folders in `folder`, not below it, of this node's ended processes."""
    for path in folder.glob(f"{glob.escape(_own_prefix())}*"):
        process = path.name.removeprefix(_own_prefix()).partition("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            _remove(path)
        except (PermissionError, ValueError):  # another user's process, or a node with a longer name
            continue


def remove_leftovers(folder: Path) -> None:
    """Remove every temporary file and folder in a tree. No process may still write to it."""
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        _remove(path)


def _remove(path: Path) -> None:
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
    # In a restarted container, a killed process can have had the same process id.
    _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, destination: Path, replace: bool = False) -> None:
    """Flush a folder and all its files to the disk, then rename it to `destination`.

    Args:
        replace: move an existing destination away first, and remove it last.

    Raises:
        OSError: renaming failed, for example because `destination` is not empty and `replace` is false.
    """
    for folder, _, names in os.walk(temporary):
        for path in (Path(folder, name) for name in names):
            if path.is_file():
                _permit(path)
                sync(path)
        sync(Path(folder))
    old = _moved_away(destination) if replace and destination.exists() else None
    temporary.rename(destination)
    sync(destination.parent)
    if old is not None:
        _remove(old)


def _permit(path: Path) -> None:
    """Give a file the permissions that the umask allows."""
    path.chmod(path.stat().st_mode | 0o666 & ~_UMASK)


def remove_folder(folder: Path) -> None:
    """Remove a folder. If the process is killed meanwhile, no partial folder keeps its name.

    Raises:
        OSError: the folder cannot be removed.
    """
    shutil.rmtree(_moved_away(folder))


def _moved_away(folder: Path) -> Path:
    old = folder.with_name(f".{folder.name}.old.tmp")
    _remove(old)
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
