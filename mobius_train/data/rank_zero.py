"""Messages that every rank has, and one prints."""

from __future__ import annotations

import logging
import os


def is_rank_zero() -> bool:
    """This process is rank 0, or belongs to no job."""
    return os.environ.get("RANK", "0") == "0"


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning on rank 0, or in a process that belongs to no job."""
    if is_rank_zero():
        logger.warning("%s", message)
