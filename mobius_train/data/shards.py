"""webdataset shards: tar files in which the members `<key>.<suffix>` of one key form a sample.

This module reads only headers and captions; nothing is unpacked or run.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mobius_train.data.buckets import Shape
from mobius_train.data.captions import MAX_CAPTION_BYTES, caption_of, read_record
from mobius_train.data.captions import SUFFIXES as CAPTIONS
from mobius_train.data.entry import Entry
from mobius_train.data.entry_list import EntryList
from mobius_train.data.kinds import CLIP_SUFFIXES as CLIPS
from mobius_train.data.rank_zero import warn_on_rank_zero
from mobius_train.data.tar_members import DamagedTar, tar_members
from mobius_train.data.texts import is_regular, legible_name, read_small_file
from mobius_train.data.verified import differing_files
from mobius_train.errors import MobiusError
from mobius_train.files import sha256
from mobius_train.job.distributed import Distributed

logger = logging.getLogger(__name__)

INDEX = "index.json"
MAX_INDEX_BYTES = 2**28
# Marks the .json of a clip whose width, height and num_frames are those of the file beside it. The fields of other
# programs often tell of the video that the clip was cut from.
MARK = {"prepared_by": "mobius-train"}
MAX_SIDE = 2**31


class Shard(NamedTuple):
    """A shard's record in index.json."""

    bytes: int
    sha256: str
    samples: int


class Span(NamedTuple):
    """A member's position in its tar."""

    offset: int
    size: int


class Contents(NamedTuple):
    """The samples of a shard, and the names of the members that belong to none."""

    samples: EntryList
    others: list[str]


def read_shards(paths: Sequence[Path], caption_language: str, distributed: Distributed | None = None) -> EntryList:
    """The samples of all shards, in the order of the shards and of the samples in them.

    If a shard's folder has an index.json that lists the shard, size, sha256 and number of samples must match. Each
    shard is hashed once per machine (see `mobius_train.data.verified`).

    Args:
        distributed: ranks that divide the reading of headers and captions; all of them call it.

    Raises:
        MobiusError: a shard is missing, truncated, differs from its index or contains an incomplete sample, or no
            shard contains a clip.
    """
    expected = {path: listed_shard(path) for path in paths}
    unlisted = [path for path, record in expected.items() if record is None and path.with_name(INDEX).is_file()]
    if unlisted:
        text = f"{len(unlisted)} shards are not in the {INDEX} of their folder, so their contents are not verified"
        warn_on_rank_zero(logger, f"{text}; the first is {unlisted[0]}")
    for path, record in expected.items():
        _check_size(path, record)
    _check_hashes({path: record.sha256 for path, record in expected.items() if record is not None})

    def read(share: int, shares: int) -> list[Contents]:
        return [_contents(path, expected[path], caption_language) for path in paths[share::shares]]

    parts = [read(0, 1)] if distributed is None else distributed.divide(read)
    entries = EntryList()
    left_out: list[str] = []
    for number in range(len(paths)):
        contents = parts[number % len(parts)][number // len(parts)]
        entries.extend(contents.samples)
        left_out += contents.others
    if not entries:
        raise MobiusError(f"no clip in {len(paths)} shards (the first is {paths[0]}): all are empty")
    if left_out:
        text = f"{len(left_out)} members of shards belong to no sample and are left out"
        warn_on_rank_zero(logger, f"{text}; the first is {left_out[0]}")
    return entries


def _contents(path: Path, record: Shard | None, caption_language: str) -> Contents:
    """
    Args:
        record: of the index, if there is one.
    """
    samples, others = _samples(path)
    if record is not None and record.samples != len(samples):
        raise MobiusError(f"{path} contains {len(samples)} samples, but {INDEX} lists {record.samples}: fetch it again")
    entries = EntryList()
    with open(path, "rb") as file:
        for key, members in samples.items():
            name = legible_name(f"{path}/{key}")
            clip, caption = (_only(members, kinds, name) for kinds in (CLIPS, CAPTIONS))
            file.seek(members[caption].offset)
            if members[caption].size > MAX_CAPTION_BYTES:
                raise MobiusError(
                    f"the caption of {name} has {members[caption].size} bytes; the limit is {MAX_CAPTION_BYTES}"
                )
            said = read_record(file.read(members[caption].size), caption, name)
            words = caption_of(said, name, caption_language)
            entries.append(Entry(legible_name(key), words, path, *members[clip], clip, name + clip, _shape(said)))
    return Contents(entries, [f"{path}/{legible_name(name)}" for name in others])


def _check_hashes(hashes: dict[Path, str]) -> None:
    try:
        differing = differing_files(hashes)
    except OSError as error:
        raise MobiusError(f"cannot read {error.filename}: {error.strerror}") from error
    if differing:
        raise MobiusError(
            f"{len(differing)} of {len(hashes)} shards differ from their sha256 in {INDEX}; the first is"
            f" {differing[0]}: fetch them again"
        )


def _shape(record: Any) -> Shape | None:
    """The clip's shape in a .json of `tools/prepare_data.py`; None in any other."""
    if not isinstance(record, dict) or any(record.get(field) != value for field, value in MARK.items()):
        return None
    sizes = [record.get(field) for field in Shape._fields]
    valid = [size for size in sizes if type(size) is int and 0 < size < MAX_SIDE]
    return Shape(*valid) if len(valid) == len(Shape._fields) else None


def _only(members: dict[str, Span], kinds: Sequence[str], name: str) -> str:
    """The member suffix of this kind; .txt is preferred to .json, which often contains other data."""
    suffixes = [kind for kind in kinds if kind in members]
    if kinds is CAPTIONS and suffixes:
        return suffixes[0]
    if len(suffixes) != 1:
        what = "caption" if kinds is CAPTIONS else "clip"
        raise MobiusError(
            f"the sample {name} has {'no' if not suffixes else 'more than one'} {what}: it needs one of"
            f" {' '.join(kinds)} and has {' '.join(sorted(members))}"
        )
    return suffixes[0]


def _samples(path: Path) -> tuple[dict[str, dict[str, Span]], list[str]]:
    """The position of every member, by key and suffix; and the names of members that belong to no sample."""
    samples: dict[str, dict[str, Span]] = defaultdict(dict)
    left_out: list[str] = []
    try:
        size = path.stat().st_size
        for member in tar_members(path):
            if member.isdir():
                continue
            shown = legible_name(member.name)
            if not member.isreg() or member.issparse():
                raise MobiusError(f"{path} contains {shown}, which is not a regular file: rewrite the shard")
            if member.offset_data + member.size > size:
                raise MobiusError(f"{path} is truncated inside {shown}: fetch or rewrite it")
            name = PurePosixPath(member.name)
            stem, dot, suffix = name.name.partition(".")
            if not stem or not dot:  # hidden files and names without a suffix do not belong to a sample
                left_out.append(member.name)
                continue
            key, suffix = str(name.with_name(stem)), f".{suffix.lower()}"
            if suffix in samples[key]:
                raise MobiusError(f"{path} contains {shown} more than once: keys must be unique")
            samples[key][suffix] = Span(member.offset_data, member.size)
    except DamagedTar as error:
        raise MobiusError(
            f"{path}, after {len(samples)} samples: {error}. Fetch or rewrite it; decompress a .gz, which does not"
            " support random access"
        ) from error
    except OSError as error:
        raise MobiusError(f"cannot read {path}: {error}") from error
    return dict(samples), left_out


def check_whole(path: Path) -> None:
    """
    Raises:
        MobiusError: the file is not a tar of samples, or is truncated.
    """
    _samples(path)


def _index(folder: Path) -> dict[str, Any]:
    """The "shards" of the folder's index.json; {} if there is none or it is of another program."""
    path = folder / INDEX
    try:
        status = path.stat()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise MobiusError(f"cannot read {path}: {error}") from error
    return _parsed_index(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _parsed_index(path: Path, mtime: int, size: int) -> dict[str, Any]:
    """mtime, size: of the file; an index that has changed is read again."""
    try:
        content = json.loads(read_small_file(path, MAX_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        raise MobiusError(f"cannot read {path}: {error}") from error
    shards = content.get("shards") if isinstance(content, dict) else None
    return shards if isinstance(shards, dict) else {}


def listed_shard(path: Path) -> Shard | None:
    """The shard's record in the index.json of its folder; None if there is none."""
    record = _index(path.parent).get(path.name)
    if record is None:
        return None
    try:
        shard = Shard(**record)
        if isinstance(shard.bytes, int) and isinstance(shard.sha256, str) and isinstance(shard.samples, int):
            return shard
    except TypeError:
        pass
    raise MobiusError(f"{path.parent / INDEX} does not list bytes, sha256 and samples of {path.name}")


def _check_size(path: Path, expected: Shard | None) -> None:
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise MobiusError(f"cannot read {path}: {error}") from error
    if not is_regular(path):
        raise MobiusError(f"{path} is not a file but a folder, a pipe or a device")
    if expected is not None and size != expected.bytes:
        raise MobiusError(f"{path} has {size} bytes, but {INDEX} lists {expected.bytes}: fetch it again")


def describe_shard(path: Path) -> Shard:
    """The shard's record for an index.json."""
    return Shard(path.stat().st_size, sha256(path), len(_samples(path)[0]))


def verify_shards(folder: Path) -> int:
    """Compare every shard with the folder's index.json (sha256); return the number of shards.

    Raises:
        MobiusError: there is no such index, or a shard is missing or differs.
    """
    names = sorted(_index(folder))
    if not names:
        raise MobiusError(f"{folder} has no {INDEX} that lists shards")
    for name in names:
        path = folder / name
        expected = listed_shard(path)
        _check_size(path, expected)
        if describe_shard(path) != expected:
            raise MobiusError(f"{path} differs from its record in {INDEX}: fetch it again")
    return len(names)
