"""The records of a metadata.jsonl or .csv, read line by line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mobius_train.data.captions import MAX_CAPTION_BYTES
from mobius_train.data.texts import encoding_of, is_regular, parse_json
from mobius_train.errors import MobiusError


class BadLine(NamedTuple):
    """A line that holds no record, for this reason."""

    reason: str


def metadata_records(metadata: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record with its place, "FILE line N". An invalid line yields a BadLine; in a .csv it is the last.

    Invalid UTF-8 becomes lone surrogates (see `mobius_train.data.texts`).

    Raises:
        MobiusError: the file cannot be read.
    """
    if metadata.exists() and not is_regular(metadata):
        raise MobiusError(f"{metadata} is not a file but a folder, a pipe or a device")
    is_csv = metadata.suffix.lower() == ".csv"
    try:
        with metadata.open("rb") as file:
            encoding = encoding_of(file.read(2))
        errors = "replace" if encoding == "utf-16" else "surrogateescape"
        # In JSON lines only \n ends a line: captions may contain the other separators.
        with metadata.open(encoding=encoding, errors=errors, newline="" if is_csv else "\n") as text:
            yield from _csv(metadata, text) if is_csv else _json_lines(metadata, text)
    except OSError as error:
        raise MobiusError(f"cannot read {metadata}: {error.strerror}") from error


def _csv(metadata: Path, text: TextIO) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(_bounded_lines(text))
    try:
        for record in reader:
            yield f"{metadata} line {reader.line_num}", record
    except (csv.Error, _TooLong) as error:
        yield f"{metadata} line {reader.line_num + 1}", BadLine(f"invalid CSV from this line: {error}")


def _json_lines(metadata: Path, text: TextIO) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := text.readline(MAX_CAPTION_BYTES + 1):
        number += 1
        where = f"{metadata} line {number}"
        if len(line) > MAX_CAPTION_BYTES:
            while line and not line.endswith("\n"):
                line = text.readline(MAX_CAPTION_BYTES)
            yield where, BadLine(f"more than {MAX_CAPTION_BYTES} characters")
        elif line.strip():
            try:
                yield where, parse_json(line, where)
            except MobiusError as error:
                yield where, BadLine(str(error).removeprefix(f"{where} is "))


class _TooLong(Exception):
    """A line of more than MAX_CAPTION_BYTES characters."""


def _bounded_lines(text: TextIO) -> Iterator[str]:
    while line := text.readline(MAX_CAPTION_BYTES + 1):
        if len(line) > MAX_CAPTION_BYTES:
            raise _TooLong(f"more than {MAX_CAPTION_BYTES} characters")
        yield line
