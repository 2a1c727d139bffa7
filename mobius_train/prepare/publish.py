"""Files that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mobius_train.durable import sync_folder

TEMPORARY = ".tmp-"


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
