"""Writing so that what has been published survives a kill and a power cut."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Bytes. Hashing and writing a part at a time leave the interpreter to training.
PART = 16 * 2**20


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
