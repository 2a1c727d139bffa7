"""Every tool imports this module first. If its Python lacks packages, it prints the remedy instead of a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import mobius_train.installation  # noqa: F401
except ModuleNotFoundError as error:
    _here = Path(__file__).resolve().parent.parent
    sys.exit(
        f"error: the Python package {error.name} is missing in {sys.executable}. Enter the environment that"
        f" `make setup` prepares: . {_here / '.venv' / 'bin' / 'activate'}, or install mobius-train there"
    )
