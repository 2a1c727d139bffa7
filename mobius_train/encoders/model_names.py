"""Model names: local folders, or names on the hub."""

from __future__ import annotations

from pathlib import Path

from mobius_train.errors import MobiusError


def check_local(name_or_path: str) -> None:
    """Reject a missing local path before the hub is queried for it.

    Raises:
        MobiusError: the name is not of the form `name` or `owner/name`, and there is no such folder.
    """
    path = Path(name_or_path)
    if not path.exists() and (path.is_absolute() or name_or_path[:1] in (".", "~") or len(path.parts) > 2):
        raise MobiusError(f"there is no model folder {name_or_path}: check the path")
