"""Exceptions that end a run early: errors with a message for the user, and requested stops."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class MobiusError(Exception):
    """An error in the input, the configuration or the data that the user can fix.

    The message states what is wrong, where, and what to do. Entry points print it without a traceback and exit with a
    non-zero status.
    """


class Stopped(Exception):
    """The run stopped on request after saving a checkpoint, from which it can resume.

    Entry points exit with `os.EX_TEMPFAIL` (75).
    """


class Interrupted(Stopped):
    """The run stopped on request before its first step, when there was nothing to save."""


def without_secrets(text: str) -> str:
    """Remove credentials, queries and fragments from the addresses in a text."""
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known name that is most like it; empty if none is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
