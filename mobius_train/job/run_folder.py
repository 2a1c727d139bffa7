"""The folder of a run: its name, its lock, and the check that a run can write it, before any model loads."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mobius_train.errors import MobiusError, Stopped
from mobius_train.files import open_regular
from mobius_train.job.run_lock import FILE, RunLock
from mobius_train.run_files import BEFORE_THE_RECIPE, FILES, FOLDERS, METRICS, OVERVIEW


class RunFolder:
    """A folder that this run alone writes to. Entering returns it; leaving releases it.

    A folder that the run has made and left empty is removed at the end.

    Args:
        pattern: the folder's path; `{time}` becomes the start time, or a variant that no other run has.
        resume: the recipe's resume_from_checkpoint.

    Raises:
        MobiusError: the folder cannot be made or written, is not empty although the run is new, or another run is in
            it.
    """

    def __init__(self, pattern: Path, resume: str | None) -> None:
        if resume is not None and "{time}" in str(pattern):
            raise MobiusError(
                f"resume_from_checkpoint={resume}, but output_dir={pattern} is a new folder at each start: set"
                " output_dir to the folder of the run to resume"
            )
        self._made: list[Path] = []
        try:
            self.path = self._make(pattern)
            if resume is None and not (self.path / FILE).exists():
                _refuse_contents(self.path)
            self.lock = RunLock(self.path)
        except OSError as error:
            self._remove_made()
            where = error.filename or pattern
            raise MobiusError(f"cannot make output_dir={pattern}: {where}: {error.strerror or error}") from error
        except MobiusError:
            self._remove_made()
            raise
        try:
            if resume is None:
                _refuse_contents(self.path)
            _check_writable(self.path)
        except MobiusError:
            self._leave(failed=False)
            raise

    def _make(self, pattern: Path) -> Path:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1, 1000):
            path = Path(str(pattern).replace("{time}", stamp if attempt == 1 else f"{stamp}-{attempt}"))
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                # Two runs that start in the same second would get the same folder.
                if path != pattern:
                    continue
                if not path.is_dir():
                    raise
            self._made = missing
            return path
        raise MobiusError(f"output_dir={pattern}: 1000 folders of this second exist already")

    def _remove_made(self) -> None:
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def _leave(self, failed: bool) -> None:
        others = [path for path in self.path.iterdir() if path.name != FILE]
        self.lock.release(failed and bool(others))
        if not others:
            self._remove_made()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._leave(failed=error is not None and not isinstance(error, Stopped))


def _refuse_contents(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    # A start that ended before its first step leaves its overview, but no recipe: the next one can take the folder.
    if names - {FILE} and not (OVERVIEW in names and names <= BEFORE_THE_RECIPE | {FILE}):
        raise MobiusError(
            f"{folder} is not empty: choose another output_dir, or resume with resume_from_checkpoint=latest"
        )


def _check_writable(folder: Path) -> None:
    """Check what a run will write to in the middle or at the end.

    Raises:
        MobiusError: a path is of the wrong kind, or cannot be written.
    """
    remedy = "remove it, or choose another output_dir"
    for name in FILES:
        path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            with open_regular(path) as file:
                if name == METRICS:
                    file.read().decode()
        except OSError as error:
            raise MobiusError(f"{path}: {error.strerror or error}, but a run writes a file there: {remedy}") from error
        except UnicodeDecodeError as error:
            raise MobiusError(f"{path} is damaged: not UTF-8 at byte {error.start}: {remedy}") from error
        if not os.access(path, os.W_OK):
            raise MobiusError(f"{path} cannot be written: {remedy}")
    for name in FOLDERS:
        path = folder / name
        if os.path.lexists(path) and not path.is_dir():
            raise MobiusError(f"{path} is not a folder, but a run writes a folder there: {remedy}")
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise MobiusError(f"{path} cannot be written: {remedy}")
