"""Files and folders that appear whole on the disk or not at all, whenever the process is killed or the power fails."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobius_train.errors import MobiusError

# Bytes. Hashing and writing a part at a time leave the interpreter to training.
PART = 16 * 2**20
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


def replace_file(path: Path, text: str) -> None:
    """Replace a small file: a reader sees the old or the new one, and never a part.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    write_file(temporary, [text.encode()])
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were added to or changed in the folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """
    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make the file under a temporary name, and give it its own once it is on the disk.

    The temporary name has the process's id: two that make the same file do not disturb each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.uname().nodename}-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def publish_lines(path: Path, records: Iterable[Any], ascii_only: bool = False) -> None:
    """One JSON a line."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=ascii_only) + "\n")

    publish(path, write)


def read_lines(path: Path) -> Iterator[Any]:
    """What `publish_lines` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def remove_leftovers(folder: Path) -> None:
    """Temporary files of processes that were killed; only when the output is finished."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


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
def finished_folder(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `destination`, which gets its name at the end; after an error it is removed.

    Raises:
        MobiusError: the destination holds something already and may not be overwritten, or cannot be written.
    """
    check_output_folder(destination, overwrite)
    temporary = destination.with_name(f".{destination.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if destination.is_dir():
            shutil.rmtree(destination)
        temporary.replace(destination)
    except OSError as error:
        raise MobiusError(f"cannot write {error.filename or destination}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
