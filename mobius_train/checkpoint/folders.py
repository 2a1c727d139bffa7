"""The checkpoint folders of a run: publishing, the `latest` pointer, and removal of old ones."""

from __future__ import annotations

from pathlib import Path

from mobius_train.checkpoint.format import NAME, step_of
from mobius_train.files import open_regular, publish_folder, remove_any, remove_folder, remove_killed, replace_file
from mobius_train.run_files import LATEST

TEMPORARY = ".checkpoint-*.tmp"


def folder_of(output_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return output_dir / f"checkpoint-{step}"


def temporary_of(output_dir: Path, step: int) -> Path:
    """Return the folder for writing a checkpoint, on the same file system, so that a rename can publish it."""
    return output_dir / f".checkpoint-{step}.tmp"


def checkpoints(output_dir: Path) -> list[Path]:
    """Return all folders named checkpoint-<n>, complete or not, in order of steps."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


def pointed(output_dir: Path) -> str | None:
    """Return the unchecked contents of `latest`, or None if there is no such file."""
    try:
        with open_regular(output_dir / LATEST) as file:
            # A checkpoint's name is short.
            return file.read(10_000).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"(unreadable: {error.strerror})"


def publish(output_dir: Path, step: int) -> None:
    """Rename the finished temporary folder to its final name, then point `latest` to it.

    Raises:
        OSError: renaming or writing failed.
    """
    folder = folder_of(output_dir, step)
    # A run resumed from an earlier step may already have a checkpoint of this step.
    publish_folder(temporary_of(output_dir, step), folder, replace=True)
    replace_file(output_dir / LATEST, f"{folder.name}\n")


def prune(output_dir: Path, keep: Path, total_limit: int | None, keep_every: int | None) -> None:
    """Remove the oldest checkpoints beyond `total_limit`, but never `keep` or multiples of `keep_every`.

    Checkpoints of later steps than `keep` are removed first. They exist when the run was resumed from an earlier step,
    for example because they are damaged, and would otherwise displace good ones.

    Raises:
        OSError: a checkpoint cannot be removed.
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
    """Remove unfinished folders and files of killed processes."""
    for folder in output_dir.glob(TEMPORARY):
        remove_any(folder)
    remove_killed(output_dir)
