"""The records of a list of clips: a .jsonl, .csv, .json or .parquet with file names and captions.

The names of the fields are those of Hugging Face's folders of images and videos. .jsonl and .csv are read line by line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mobius_train.data.captions import MAX_CAPTION_BYTES
from mobius_train.data.texts import decode_text, encoding_of, is_regular, legible_name, parse_json, read_small_file
from mobius_train.errors import MobiusError

LISTS = (".jsonl", ".csv", ".json", ".parquet")
# The first that a record has names its file.
FILE_FIELDS = ("file_name", "video_file_name", "image_file_name", "video", "path")
MAX_JSON_BYTES = 2**29
MAX_SKIPPED = 2**26  # characters of a line that holds no record
ROWS = 1024  # of a .parquet, at once


class BadLine(NamedTuple):
    """A line that holds no record, for this reason."""

    reason: str


def metadata_records(metadata: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record with its place, "FILE line N". An invalid line yields a BadLine; but for .jsonl it is the last.

    A .json is a list of records, or {file name: record or caption}. Invalid UTF-8 becomes lone surrogates (see
    `mobius_train.data.texts`).

    Raises:
        MobiusError: the file cannot be read, or it is a .parquet and pyarrow is not installed.
    """
    if metadata.exists() and not is_regular(metadata):
        raise MobiusError(f"{metadata} is not a file but a folder, a pipe or a device")
    suffix = metadata.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(metadata)
        return
    if suffix == ".json":
        yield from _json(metadata)
        return
    is_csv = suffix == ".csv"
    try:
        with metadata.open("rb") as file:
            encoding = encoding_of(file.read(2))
        errors = "replace" if encoding == "utf-16" else "surrogateescape"
        # In JSON lines only \n ends a line: captions may contain the other separators.
        with metadata.open(encoding=encoding, errors=errors, newline="" if is_csv else "\n") as text:
            yield from _csv(metadata, text) if is_csv else _json_lines(metadata, text)
    except OSError as error:
        raise MobiusError(f"cannot read {metadata}: {error.strerror}") from error


def file_name_of(record: Any) -> str:
    """The file that a record names, relative to the list's folder.

    Raises:
        ValueError: it names none; the text tells the fields that it has.
    """
    if not isinstance(record, dict):
        raise ValueError('has no "file_name"')
    for field in FILE_FIELDS:
        if isinstance(record.get(field), str) and record[field]:
            return record[field]
    fields = legible_name(", ".join(str(field) for field in record)) or "none"
    raise ValueError(f'has no "file_name", only {fields}')


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
            skipped = len(line)
            while line and not line.endswith("\n"):
                if skipped > MAX_SKIPPED:
                    yield where, BadLine(f"more than {MAX_SKIPPED} characters; the rest of the file is not read")
                    return
                line = text.readline(MAX_CAPTION_BYTES)
                skipped += len(line)
            yield where, BadLine(f"more than {MAX_CAPTION_BYTES} characters")
        elif line.strip():
            try:
                yield where, parse_json(line, where)
            except MobiusError as error:
                yield where, BadLine(str(error).removeprefix(f"{where} is "))


def _json(metadata: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = parse_json(decode_text(read_small_file(metadata, MAX_JSON_BYTES)), "it")
    except MobiusError as error:
        if str(error).startswith("it is "):
            yield f"{metadata} line 1", BadLine(str(error).removeprefix("it is "))
            return
        raise
    if isinstance(content, dict):
        content = [
            {"file_name": name} | (about if isinstance(about, dict) else {"text": about})
            for name, about in content.items()
        ]
    if not isinstance(content, list):
        yield f"{metadata} line 1", BadLine("neither a list nor a mapping")
        return
    for number, record in enumerate(content, start=1):
        yield f"{metadata} record {number}", record


def _parquet(metadata: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MobiusError(
            f"{metadata} needs pyarrow: pip install 'mobius-train[parquet]', or write the list as .jsonl or .csv"
        ) from error
    number = 0
    try:
        with ParquetFile(metadata) as table:
            for rows in table.iter_batches(batch_size=ROWS):
                for record in rows.to_pylist():
                    number += 1
                    yield f"{metadata} row {number}", record
    except OSError as error:
        raise MobiusError(f"cannot read {metadata}: {error}") from error
    except (ArrowException, ValueError) as error:
        yield f"{metadata} row {number + 1}", BadLine(f"not readable as Parquet: {str(error).splitlines()[0]}")


class _TooLong(Exception):
    """A line of more than MAX_CAPTION_BYTES characters."""


def _bounded_lines(text: TextIO) -> Iterator[str]:
    while line := text.readline(MAX_CAPTION_BYTES + 1):
        if len(line) > MAX_CAPTION_BYTES:
            raise _TooLong(f"more than {MAX_CAPTION_BYTES} characters")
        yield line
