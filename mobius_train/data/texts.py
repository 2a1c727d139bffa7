"""Text of other people's files: captions, metadata, names. Bytes that are not UTF-8 are replaced, never fatal."""

from __future__ import annotations

import codecs
import json
import stat
import unicodedata
from pathlib import Path
from typing import Any

from mobius_train.errors import MobiusError
from mobius_train.files import read_small

REPLACED = "\ufffd"  # stands for what is not valid UTF-8


def is_regular(path: Path) -> bool:
    """True for a file, also through a link; false for folders, pipes and devices, which may block or never end."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # a name that the file system cannot have
        return False


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """
    Raises:
        MobiusError: the file is missing, no regular file, or larger than `max_bytes`.
    """
    try:
        return read_small(path, max_bytes)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MobiusError(f"cannot read {legible_name(str(path))}: {reason}") from error


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with `head`: UTF-16 by its mark, else UTF-8 with or without a mark."""
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decode_text(data: bytes) -> str:
    """Decode text; invalid bytes become lone surrogates (PEP 383), which still name files, until `clean_text`."""
    encoding = encoding_of(data)
    return data.decode(encoding, "replace" if encoding == "utf-16" else "surrogateescape")


def clean_text(text: str) -> str:
    """Replace lone surrogates, which stand for invalid bytes or come from damaged JSON, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_json(text: str, where: str) -> Any:
    """
    Raises:
        MobiusError: the text is not JSON, or nested too deeply, or has an absurdly long number; names `where`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MobiusError(f"{where} is not valid JSON: {error}") from error


def legible_name(text: str) -> str:
    """Escape invalid UTF-8 and control characters, so that a name can be printed and stored."""
    # Most names; neither of the two is printable.
    if text.isprintable():
        return text
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # lone surrogates of JSON
        data = text.encode("utf-8", "surrogatepass")
    legible = data.decode("utf-8", "backslashreplace")
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in legible)
