"""Clips as files in a folder, or listed in a text or metadata file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mobius_train.config_sections import Section
from mobius_train.data.captions import SUFFIXES as CAPTIONS
from mobius_train.data.captions import caption_field
from mobius_train.data.metadata import BadLine, file_name_of, metadata_records
from mobius_train.data.patterns import NothingThere
from mobius_train.data.texts import clean_text, legible_name, read_small_file
from mobius_train.prepare.candidate import Drop
from mobius_train.prepare.sources.reference import STAGE, Member, Reference, pair_captions, refused_input

MAX_LIST_BYTES = 2**29


class Folder(Section):
    """Every file of a folder and its subfolders; a.txt or a.json is the caption of a.gif."""

    kind: Literal["folder"]
    path: Path
    captions: Literal["required", "optional"] = "required"

    def references(self, work: Path) -> list[Reference]:
        """
        Raises:
            NothingThere: there is no such folder.
        """
        if not self.path.is_dir():
            raise NothingThere(f"there is no folder {self.path}")
        return pair_captions(_walk(self.path), f"{self.path}/")


class Metadata(Section):
    """The files listed in a .jsonl, .csv, .json or .parquet: `file_name`, `text` or `caption`; `labels`, `group`."""

    kind: Literal["metadata"]
    path: Path
    captions: Literal["required", "optional"] = "required"

    def references(self, work: Path) -> list[Reference]:
        """
        Raises:
            MobiusError: the file cannot be read.
        """
        return [_listed(self.path, where, record) for where, record in metadata_records(self.path)]


class FileList(Section):
    """The files listed in a text file, one relative path per line; captions are next to the files."""

    kind: Literal["list"]
    path: Path
    captions: Literal["required", "optional"] = "required"

    def references(self, work: Path) -> list[Reference]:
        """
        Raises:
            MobiusError: the list cannot be read.
        """
        lines = read_small_file(self.path, MAX_LIST_BYTES).splitlines()
        names = [os.fsdecode(line) for line in lines if line.strip()]
        members = [_member(self.path.parent / name, name) for name in names]
        listed, captions = set(names), []
        for member in members:
            for suffix in CAPTIONS:
                path = member.path.with_suffix(suffix)
                name = str(Path(member.name).with_suffix(suffix))
                if member.problem is None and path.is_file() and name not in listed:
                    captions.append(_member(path, name))
                    break
        return pair_captions([*members, *captions], f"{self.path.parent}/")


def _walk(folder: Path) -> Iterator[Member]:
    """Yield the files sorted by name. A link to outside the folder is a problem; linked folders are not entered."""
    real = folder.resolve()
    unreadable: list[OSError] = []
    for where, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        for name in sorted([*names, *(f for f in folders if os.path.islink(os.path.join(where, f)))]):
            path = Path(where, name)
            member = _member(path, str(path.relative_to(folder)))
            # realpath, since resolve raises on loops of links.
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real):
                member = member._replace(problem=Drop(STAGE, "link", "it points outside the folder"))
            yield member
    for error in unreadable:
        path = Path(error.filename)
        problem = Drop(STAGE, "unreadable", f"a folder: {error.strerror}")
        yield Member(str(path.relative_to(folder)), path, 0, 0, problem)


def _member(path: Path, name: str) -> Member:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that the file system cannot have
        reason = "link" if isinstance(error, OSError) and path.is_symlink() else "unreadable"
        detail = error.strerror if isinstance(error, OSError) else None
        return Member(name, path, 0, 0, Drop(STAGE, reason, detail or str(error)))
    if not stat.S_ISREG(status.st_mode):
        return Member(name, path, 0, 0, Drop(STAGE, "no file", "a folder, a pipe or a device"))
    return Member(name, path, 0, status.st_size)


def _listed(metadata: Path, where: str, record: Any) -> Reference:
    if isinstance(record, BadLine):
        problem = Drop(STAGE, "damaged", record.reason)
        return Reference(f"{metadata.stem}-{where.rpartition(' ')[2]}", where, problem=problem)
    try:
        name = file_name_of(record)
    except ValueError as error:
        return refused_input(where, where, "missing member", f"it {error}")
    folder = metadata.parent
    origin = f"{folder}/{legible_name(name)} ({where})"
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a name with a zero byte, a loop of links
        return refused_input(name, origin, "unreadable", str(error))
    if not inside:
        return refused_input(name, origin, "path traversal", "the name points outside the folder")
    [reference] = pair_captions([_member(path, name)], f"{folder}/", listed=True)
    reference.caption = caption_field(record)
    reference.labels = _labels(record.get("labels", record.get("label")))
    reference.group = clean_text(str(record.get("group") or ""))
    return reference


def _labels(value: Any) -> list[str]:
    """Labels from a list, or from comma-separated text in a .csv."""
    if isinstance(value, str):
        value = value.split(",")
    return [clean_text(str(label).strip()) for label in value if str(label).strip()] if isinstance(value, list) else []
