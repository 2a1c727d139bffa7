"""Output folders that appear when they are finished and checked, and not at all otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobius_train.cli import check_output_folder
from mobius_train.errors import MobiusError


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
