"""What a data source's text names: paths, or addresses."""

from __future__ import annotations

import re

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


def is_remote(source: str) -> bool:
    """Whether a source names addresses, or anything else than paths."""
    return any(SCHEME.match(one) for one in (source, *expand(source)))


def without_secrets(text: str) -> str:
    """A text without the credentials, queries and fragments of the addresses in it."""
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", text)
