"""Parsing of a data source's text into local paths or addresses."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from mobius_train.errors import MobiusError, without_secrets

# More files than any data set has shards; expanding them takes a second.
MAX_NAMES = 2**18
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
SCHEME = re.compile(r"^\s*[A-Za-z][A-Za-z0-9+.-]*:")


class NothingThere(MobiusError):
    """A path or a pattern matches no file and no folder."""


@contextmanager
def naming(field: str, remedy: str) -> Iterator[None]:
    """Add to an error about a path what its reader does not know.

    Args:
        field: the field or the option that has the path.
        remedy: what to do.

    Raises:
        NothingThere: the code inside raised it.
    """
    try:
        yield
    except NothingThere as error:
        raise NothingThere(f"{field}: {error}; {remedy}") from error


def expand_braces(source: str) -> list[str]:
    """Expand the braces of a source to paths, patterns or addresses.

    Raises:
        MobiusError: the braces are unbalanced, or stand for more than MAX_NAMES names.
    """
    too_many = MobiusError(without_secrets(f"the braces in {source!r} stand for more than {MAX_NAMES} names"))
    # braceexpand keeps a whole range in memory. A number of 9 digits or more is out of any range that is meant.
    for ends in RANGE.findall(source):
        if max(map(len, ends)) > 9 or abs(int(ends[1]) - int(ends[0])) >= MAX_NAMES:
            raise too_many
    try:
        names = list(islice(braceexpand(source), MAX_NAMES + 1))
    except (ValueError, RecursionError):
        raise MobiusError(without_secrets(f"the braces in {source!r} are unbalanced")) from None
    if len(names) > MAX_NAMES:
        raise too_many
    return names


def local_paths(source: str) -> list[Path]:
    """The files that match a path, a glob or braces, in the order of the braces and sorted within a glob.

    Raises:
        MobiusError: it is an address, or the braces are unbalanced.
        NothingThere: a pattern matches nothing.
    """
    if os.path.exists(source):
        return [Path(source)]
    paths: list[Path] = []
    for pattern in expand_braces(source):
        refuse_address(pattern)
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            origin = "" if pattern == source else f" (from {source})"
            raise NothingThere(f"there is no file or folder {pattern}{origin}")
        paths += [Path(path) for path in matches]
    return paths


def refuse_address(source: str) -> None:
    """
    Raises:
        MobiusError: the source is an address or a command instead of a local path.
    """
    if SCHEME.match(source):
        raise MobiusError(
            f"{without_secrets(source)!r} is not a local path; nothing was run or fetched. Give a local folder or local"
            " files (start a file name that contains a colon with ./)"
        )


def is_remote(source: str) -> bool:
    """True if a source contains an address."""
    return any(SCHEME.match(place) for place in (source, *expand_braces(source)))
