"""Messages that every rank has, and one prints."""

from __future__ import annotations

import logging

from mobius_train.job.environment import is_rank_zero


def warn_on_rank_zero(logger: logging.Logger, message: str) -> None:
    """Log a warning on rank 0, or in a process that belongs to no job."""
    if is_rank_zero():
        logger.warning("%s", message)
