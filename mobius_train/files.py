"""Files and folders that appear whole on the disk or not at all, whenever the process is killed or the power fails."""

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

# Bytes. Hashing and writing a part at a time leave the interpreter to training.
PART = 16 * 2**20
# How temporary names begin; the node, the process and the final name follow.
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class File:
    """A file as it was written."""

    bytes: int
    sha256: str


def write_file(path: Path, contents: Sequence[bytes | memoryview]) -> File:
    """Write and sync a file.

    Raises:
        OSError: the disk is full, say.
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
                    # A disk that fills up may take some of it first.
                    part = part[file.write(part) :]
        os.fsync(file.fileno())
    return File(size, digest.hexdigest())


def sync(path: Path) -> None:
    """Put a file, or a folder's list of names, on the disk.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_of(path: Path) -> Path:
    """The name beside `path` under which this process makes it: no other process, here or on another node, has it."""
    return path.with_name(f"{_own_prefix()}{os.getpid()}-{path.name}")


def _own_prefix() -> str:
    return f"{TEMPORARY}{os.uname().nodename}-"


def remove_killed(folder: Path) -> None:
    """Remove the temporary files and folders directly in `folder` of this node's processes that are no more."""
    for path in folder.glob(f"{glob.escape(_own_prefix())}*"):
        process = path.name.removeprefix(_own_prefix()).partition("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            _remove(path)
        except (PermissionError, ValueError):  # another user's process, or a node whose name begins like this one's
            continue


def remove_leftovers(folder: Path) -> None:
    """Remove every temporary file and folder in a tree: nothing may be writing to it any more."""
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def finished_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary names for files, which get their own names once all are complete and on the disk.

    After an error no file gets its name, and the temporary ones are removed.

    Raises:
        OSError: a file cannot be written.
    """
    temporaries = [temporary_of(path) for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            sync(temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        sync(folder)


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file under a temporary name, and give it its own once it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with finished_files([path]) as [temporary]:
        write(temporary)


def replace_file(path: Path, text: str) -> None:
    """Replace a small file: a reader sees the old or the new one, and never a part.

    Raises:
        OSError: it cannot be written.
    """
    publish(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def publish_lines(path: Path, records: Iterable[Any], ascii_only: bool = False) -> None:
    """Publish one JSON text a line.

    Raises:
        OSError: the file cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=ascii_only) + "\n")

    publish(path, write)


def read_lines(path: Path) -> Iterator[Any]:
    """The records that `publish_lines` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON.
    """
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def check_output_folder(folder: Path, overwrite: bool = False) -> None:
    """Refuse an output folder that holds something already; nothing is created or deleted.

    Raises:
        MobiusError: it is a file, or a folder with files in it and overwrite was not asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise MobiusError(f"the output folder {folder} is a file: give another one")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise MobiusError(f"the output folder {folder} is not empty: give another one, or --overwrite")


@contextmanager
def temporary_folder(destination: Path) -> Iterator[Path]:
    """A folder to make what `destination` will hold in; what is left under its temporary name is removed."""
    remove_killed(destination.parent)
    temporary = temporary_of(destination)
    # In a container that is started again, a killed process may have had this one's number.
    _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, destination: Path, replace: bool = False) -> None:
    """Put a folder and all its files on the disk, and give it its name.

    Args:
        replace: a folder of that name is moved away first and removed last.

    Raises:
        OSError: it cannot be renamed, or `destination` holds something and is not to be replaced.
    """
    for folder, _, names in os.walk(temporary):
        for path in (Path(folder, name) for name in names):
            if path.is_file():
                sync(path)
        sync(Path(folder))
    old = _moved_away(destination) if replace and destination.exists() else None
    temporary.rename(destination)
    sync(destination.parent)
    if old is not None:
        _remove(old)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a kill on the way leaves no part of it under its name.

    Raises:
        OSError: it cannot be removed.
    """
    shutil.rmtree(_moved_away(folder))


def _moved_away(folder: Path) -> Path:
    old = folder.with_name(f".{folder.name}.old.tmp")
    _remove(old)
    return folder.rename(old)


@contextmanager
def finished_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder, which becomes `destination` at the end; after an error it is removed.

    Raises:
        MobiusError: the destination holds something already and may not be overwritten, or cannot be written.
    """
    check_output_folder(destination, overwrite)
    try:
        with temporary_folder(destination) as temporary:
            yield temporary
            publish_folder(temporary, destination, replace=True)
    except OSError as error:
        raise MobiusError(f"cannot write {error.filename or destination}: {error.strerror or error}") from error
