"""Warnings about the data, which every rank finds and one prints."""

from __future__ import annotations

import logging
import os


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning on rank 0, or in a process that belongs to no job."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)
