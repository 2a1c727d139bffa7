"""Progress of long work: a bar on a terminal, in a file a line every 30 seconds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

# Seconds between lines in a file.
EVERY = 30.0
# Seconds after which work that is often short gets a bar: progress(…, delay=DELAY).
DELAY = 2.0
# Warnings of one kind that are written in full.
SHOWN = 3
UP = "\x1b[A"
LINE = "{desc}: {n_fmt} of {total_fmt} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]"


class _Lines:
    """A stream for tqdm that writes each state as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        # A bar below another one moves the cursor.
        line = text.replace(UP, "").strip()
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
    """Writes messages above a bar instead of into it. Of warnings of one kind it writes the first `SHOWN`, and then
    only their number: the 10th, the 100th and so on, and at the end all of them.

    A kind is a message without its arguments, such as that of every caption that is too long.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, int] = {}
        self._written: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        try:
            kind, text = str(record.msg), self.format(record)
            # "%s" alone is every message.
            if record.levelno == logging.WARNING and record.args and kind != "%s":
                count = self._counts[kind] = self._counts.get(kind, 0) + 1
                if count > SHOWN and str(count).rstrip("0") != "1":
                    return
                self._written[kind] = count
                text += f" ({count} warnings of this kind)" if count > SHOWN else ""
            tqdm.write(text, file=sys.stderr)
        except Exception:  # As logging's own handlers: a message that cannot be written ends nothing.
            self.handleError(record)

    def close(self) -> None:
        """Write how many warnings of each kind there were, if some were not written."""
        for kind, count in self._counts.items():
            if count > self._written[kind]:
                with suppress(Exception):
                    tqdm.write(f"WARNING: {count} warnings in all: {kind}", file=sys.stderr)
        self._counts.clear()
        super().close()
