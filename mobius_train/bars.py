"""Progress of long work: a bar on a terminal, in a file a line every 30 seconds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

# Seconds between lines in a file.
EVERY = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]"


class _Lines:
    """A stream for tqdm that writes each state as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(items: Iterable[Item] | None = None, **options: Any) -> tqdm[Item]:
    """tqdm's bar on stderr; if that is no terminal, lines every `EVERY` seconds.

    Args:
        options: of tqdm; `desc` and `unit` name the work.
    """
    if sys.stderr.isatty():
        return tqdm(items, dynamic_ncols=True, **options)
    lines: Any = _Lines(sys.stderr)
    return tqdm(items, file=lines, bar_format=LINE, mininterval=EVERY, maxinterval=EVERY, miniters=1, **options)


class AboveBars(logging.StreamHandler[TextIO]):
    """Writes messages above a bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # As logging's own handlers: a message that cannot be written ends nothing.
            self.handleError(record)
