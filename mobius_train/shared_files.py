"""The files beside the package: recipes, DeepSpeed configurations, tools, the embedded data and backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
# The checkout; in an installed wheel the copy that setup.py makes.
REPOSITORY = _PACKAGE.parent if (_PACKAGE.parent / "configs").is_dir() else _PACKAGE / "share"
EMBEDDED = "assets/"
# The DeepSpeed configuration of commands that are given none.
ZERO2 = REPOSITORY / "ds_configs" / "zero2.json"


def found_anywhere(value: Any) -> Any:
    """The value with paths of embedded files as they are found from any folder.

    A text that begins with `assets/` stays as it is if this folder has such a folder, as a checkout has.
    """
    if isinstance(value, dict):
        return {name: found_anywhere(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [found_anywhere(inner) for inner in value]
    if isinstance(value, str) and value.startswith(EMBEDDED) and not Path(EMBEDDED).is_dir():
        return str(REPOSITORY / value)
    return value
