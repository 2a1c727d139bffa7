"""metrics.jsonl: one JSON object per line."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobius_train.files import replace_file

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends lines. Each is written at once, so a killed run keeps them; on a full disk they are buffered in memory.

    Args:
        first_step: the last completed step of a resumed run. Lines that the run will write again (later steps and the
            validation at this step) are removed, and so is an incomplete last line.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        _keep_until(path, first_step)
        self._file = path.open("ab", buffering=0)
        self._waiting, self._full = b"", False

    def write(self, values: Mapping[str, Any]) -> None:
        self._waiting += json.dumps(values).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._full:
                logger.error("%s: %s; metrics are buffered in memory until there is space", self._path, error.strerror)
            self._full = True
        else:
            self._full = False

    def close(self) -> None:
        self._file.close()
        if self._waiting:
            logger.error("%s: the last %d lines could not be written", self._path, self._waiting.count(b"\n"))


def _keep_until(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_before(line, step)]
        replace_file(path, "".join(f"{line}\n" for line in kept))


def _is_before(line: str, step: int) -> bool:
    try:
        values = json.loads(line)
        at = float(values["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        at, values = math.inf, {}
    return at < step or (at == step and "loss" in values)
