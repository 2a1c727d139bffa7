"""Every command imports this module first. A missing package then ends it with the remedy, not a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).resolve().parent.parent


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception; for a missing package, the environments that have it."""
    name = (getattr(error, "name", None) or "").partition(".")
    # Of this package itself only the whole can be missing, not a module.
    if not isinstance(error, ModuleNotFoundError) or (name[0] == "mobius_train" and name[2]):
        sys.__excepthook__(kind, error, trace)
        return
    print(
        f"error: the Python package {name[0]} is missing in {sys.executable}. Run this command with the Python that"
        f" `make setup` prepares, {REPOSITORY / '.venv' / 'bin' / 'python'}, or install the packages:"
        f" {sys.executable} -m pip install -c constraints.txt -e '.[emoji,test]' in {REPOSITORY}",
        file=sys.stderr,
    )


sys.excepthook = explain
