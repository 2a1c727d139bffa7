"""What a data source's text names: paths, or addresses."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from braceexpand import braceexpand

from mobius_train.errors import MobiusError

SCHEME = re.compile(r"^\s*[A-Za-z][A-Za-z0-9+.-]*:")


def expand(source: str) -> list[str]:
    """The paths, patterns or addresses that a source's braces stand for.

    Raises:
        MobiusError: the braces do not match.
    """
    try:
        return list(braceexpand(source))
    except ValueError:
        raise MobiusError(without_secrets(f"the braces of {source!r} do not match")) from None


def local_paths(source: str) -> list[Path]:
    """The files that a path, a glob or braces stand for: in the order of the braces, and of names within a glob.

    Raises:
        MobiusError: it is an address, the braces do not match, or one of their patterns matches nothing.
    """
    if Path(source).exists():
        return [Path(source)]
    paths: list[Path] = []
    for pattern in expand(source):
        refuse_address(pattern)
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise MobiusError(f"there is no file or folder {pattern}{'' if pattern == source else f', of {source}'}")
        paths += [Path(path) for path in found]
    return paths


def refuse_address(source: str) -> None:
    """
    Raises:
        MobiusError: the source is an address or a command, and no local path.
    """
    if SCHEME.match(source):
        raise MobiusError(
            f"{without_secrets(source)!r} is no local path; nothing was run or fetched. Give a folder or files on"
            " a disk (a file whose name has a colon: with ./ in front)"
        )


def is_remote(source: str) -> bool:
    """Whether a source names addresses, or anything else than paths."""
    return any(SCHEME.match(one) for one in (source, *expand(source)))


def without_secrets(text: str) -> str:
    """A text without the credentials, queries and fragments of the addresses in it."""
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", text)
