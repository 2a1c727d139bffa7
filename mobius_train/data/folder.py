"""A folder of clips: a.gif with a.txt, or a metadata.jsonl or metadata.csv with file names and captions."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mobius_train.data.captions import SUFFIXES as CAPTIONS
from mobius_train.data.captions import Caption, caption_of, read_caption
from mobius_train.data.entry import Entry
from mobius_train.data.kinds import CLIP_SUFFIXES as CLIPS
from mobius_train.errors import MobiusError
from mobius_train.media.clip_files import METADATA_NAME

METADATA = (METADATA_NAME, "metadata.csv")


def read_folder(folder: Path, caption_language: str) -> list[Entry]:
    """The clips of a folder and its subfolders, sorted by name; keys are paths without suffix.

    If there is a metadata file, exactly the clips it lists are used. Otherwise every clip needs a .txt or .json of the
    same name.

    Raises:
        MobiusError: there is no clip, a clip has no caption, or a metadata line names no clip of the folder.
    """
    metadata = [folder / name for name in METADATA if (folder / name).exists()]
    if len(metadata) > 1:
        raise MobiusError(f"{folder} has both {' and '.join(METADATA)}: keep only one")
    entries = _listed(folder, metadata[0], caption_language) if metadata else _paired(folder, caption_language)
    return sorted(entries)


def _entry(folder: Path, path: Path, captions: tuple[Caption, ...]) -> Entry:
    key = path.relative_to(folder).with_suffix("").as_posix()
    return Entry(key, captions, path, 0, path.stat().st_size, path.suffix.lower(), str(path))


def _paired(folder: Path, language: str) -> list[Entry]:
    files = [p for p in folder.rglob("*") if not p.name.startswith(".") and p.is_file()]
    clips = sorted(path for path in files if path.suffix.lower() in CLIPS)
    if not clips:
        kinds = Counter(path.suffix.lower() or "without suffix" for path in files)
        contents = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "nothing"
        hint = f". For shards give a pattern: {folder}/*.tar" if ".tar" in kinds else ""
        raise MobiusError(f"{folder} contains no clips ({' '.join(CLIPS)}), only {contents}{hint}")
    captions = {path: [c for s in CAPTIONS if (c := path.with_suffix(s)).is_file()] for path in clips}
    bare = [path for path, candidates in captions.items() if not candidates]
    if bare:
        raise MobiusError(
            f"{len(bare)} of {len(clips)} clips in {folder} have no caption: add"
            f" {bare[0].with_suffix('.txt').name} for {bare[0].name}, or a metadata.jsonl for the folder"
        )
    return [
        _entry(folder, path, read_caption(caption.read_bytes(), caption.suffix, str(path), language))
        for path, (caption, *_) in captions.items()
    ]


def _listed(folder: Path, metadata: Path, language: str) -> list[Entry]:
    entries = []
    try:
        text = metadata.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MobiusError(f"cannot read {metadata} as UTF-8: {error}") from error
    for where, record in _records(metadata, text):
        name = record.get("file_name") if isinstance(record, dict) else None
        if not isinstance(name, str) or not name:
            raise MobiusError(f'{where} has no "file_name"')
        path = folder / name
        if PurePosixPath(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
            raise MobiusError(f"{where}: {name} is outside the folder")
        if path.suffix.lower() not in CLIPS:
            raise MobiusError(f"{where}: {name} is not a clip: supported are {', '.join(CLIPS)}")
        if not path.is_file():
            raise MobiusError(f"{where}: there is no file {path}")
        entries.append(_entry(folder, path, caption_of(record, where, language)))
    if not entries:
        raise MobiusError(f"{metadata} lists no clips: it is empty")
    return entries


def _records(metadata: Path, text: str) -> Iterator[tuple[str, Any]]:
    if metadata.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for record in reader:
            yield f"{metadata}, line {reader.line_num}", record
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{metadata}, line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise MobiusError(f"{where} is not valid JSON: {error}") from error
