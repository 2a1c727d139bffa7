"""The checkpoints of a run folder: putting a finished one in place, the pointer to it, and which are removed."""

from __future__ import annotations

import shutil
from pathlib import Path

from mobius_train.checkpoint.format import LATEST, NAME, step_of
from mobius_train.files import publish_folder, remove_folder, remove_killed, replace_file

TEMPORARY = ".checkpoint-*.tmp"


def folder_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def temporary_of(output_dir: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole; on the same file system, so that a rename puts it in place."""
    return output_dir / f".checkpoint-{step}.tmp"


def checkpoints(output_dir: Path) -> list[Path]:
    """All folders named checkpoint-<n>, whole or not, fewest steps first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


def pointed(output_dir: Path) -> str | None:
    """The name in `latest`, whatever it is; none: there is no such file."""
    try:
        return (output_dir / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"(unreadable: {error.strerror})"


def publish(output_dir: Path, step: int) -> None:
    """Put the finished temporary folder in place, then let `latest` name it.

    Raises:
        OSError: it cannot be.
    """
    folder = folder_of(output_dir, step)
    # A run that was resumed from before this step may find a checkpoint of it.
    publish_folder(temporary_of(output_dir, step), folder, replace=True)
    replace_file(output_dir / LATEST, f"{folder.name}\n")


def prune(output_dir: Path, keep: Path, total_limit: int | None, keep_every: int | None) -> None:
    """Remove the oldest checkpoints beyond `total_limit`; `keep`, and multiples of `keep_every`, stay.

    Those of later steps than `keep` are the first to go: the run was taken up again before them, since they are
    damaged, say, and would take the place of good ones.

    Raises:
        OSError: one cannot be removed.
    """
    if total_limit is None:
        return
    others = [
        folder
        for folder in checkpoints(output_dir)
        if folder != keep and (keep_every is None or step_of(folder) % keep_every != 0)
    ]
    others.sort(key=lambda folder: (step_of(folder) < step_of(keep), step_of(folder)))
    for folder in others[: max(0, len(others) + 1 - total_limit)]:
        remove_folder(folder)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a kill left unfinished."""
    for folder in output_dir.glob(TEMPORARY):
        shutil.rmtree(folder, ignore_errors=True)
    remove_killed(output_dir)
