"""webdataset shards: tar files in which the members `<key>.<suffix>` of one key form a sample.

This module reads only headers and captions, with the standard library's tarfile; nothing is unpacked or run.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mobius_train.data.buckets import Shape
from mobius_train.data.captions import MAX_CAPTION_BYTES, read_caption
from mobius_train.data.captions import SUFFIXES as CAPTIONS
from mobius_train.data.entry import Entry
from mobius_train.data.kinds import CLIP_SUFFIXES as CLIPS
from mobius_train.errors import MobiusError
from mobius_train.files import sha256

INDEX = "index.json"
END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


class Shard(NamedTuple):
    """A shard's record in index.json."""

    bytes: int
    sha256: str
    samples: int


class Span(NamedTuple):
    """A member's position in its tar."""

    offset: int
    size: int


def read_shards(paths: Sequence[Path], caption_language: str) -> list[Entry]:
    """The samples of all shards, in the order of the shards and of the samples in them.

    If a shard's folder has an index.json that lists the shard, size and number of samples must match.

    Raises:
        MobiusError: a shard is missing, truncated, differs from its index or contains an incomplete sample, or no
            shard contains a clip.
    """
    entries: list[Entry] = []
    for path in paths:
        expected = listed_shard(path)
        _check_size(path, expected)
        samples = _samples(path)
        if expected is not None and expected.samples != len(samples):
            raise MobiusError(
                f"{path} contains {len(samples)} samples, but {INDEX} lists {expected.samples}: fetch it again"
            )
        with open(path, "rb") as file:
            for key, members in samples.items():
                name = f"{path}/{key}"
                clip, caption = (_only(members, kinds, name) for kinds in (CLIPS, CAPTIONS))
                file.seek(members[caption].offset)
                if members[caption].size > MAX_CAPTION_BYTES:
                    raise MobiusError(
                        f"the caption of {name} has {members[caption].size} bytes; the limit is {MAX_CAPTION_BYTES}"
                    )
                data = file.read(members[caption].size)
                words = read_caption(data, caption, name, caption_language)
                shape = _shape(data) if caption == ".json" else None
                entries.append(Entry(key, words, path, *members[clip], clip, name + clip, shape))
    if not entries:
        raise MobiusError(f"no clip in {len(paths)} shards (the first is {paths[0]}): all are empty")
    return entries


def _shape(data: bytes) -> Shape | None:
    """The clip's shape in a valid .json, as `tools/prepare_data.py` writes it; None if it has none."""
    record = json.loads(data)
    sizes = [record.get(field) for field in Shape._fields] if isinstance(record, dict) else []
    valid = [size for size in sizes if type(size) is int and size > 0]
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


def _samples(path: Path) -> dict[str, dict[str, Span]]:
    """The position of every member, by key and suffix; also checks the end of the tar (`ends_at`)."""
    samples: dict[str, dict[str, Span]] = defaultdict(dict)
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise MobiusError(f"{path} contains {member.name}, which is not a regular file: rewrite the shard")
                if member.offset_data + member.size > size:
                    raise MobiusError(f"{path} is truncated inside {member.name}: fetch or rewrite it")
                name = PurePosixPath(member.name)
                stem, dot, suffix = name.name.partition(".")
                if not stem or not dot:  # hidden files and names without a suffix do not belong to a sample
                    continue
                key, suffix = str(name.with_name(stem)), f".{suffix.lower()}"
                if suffix in samples[key]:
                    raise MobiusError(f"{path} contains {member.name} more than once: keys must be unique")
                samples[key][suffix] = Span(member.offset_data, member.size)
            end = tar.offset
        if not ends_at(path, end):
            raise MobiusError(
                f"{path} is truncated or damaged at byte {end}, after {len(samples)} samples: fetch or rewrite it"
            )
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise MobiusError(
            f"{path} is not a complete, uncompressed tar ({error}): fetch or rewrite it; decompress a .gz, which does"
            " not support random access"
        ) from error
    except OSError as error:
        raise MobiusError(f"cannot read {path}: {error}") from error
    return dict(samples)


def ends_at(path: Path, end: int) -> bool:
    """True if a tar is complete. `tarfile` treats a broken or missing header as the end of the archive.

    A complete tar has two blocks of zeros after the last member's data.

    Args:
        end: byte offset at which `tarfile` stopped.
    """
    with path.open("rb") as file:
        file.seek(end)
        return file.read(len(END_OF_ARCHIVE)) == END_OF_ARCHIVE


def check_whole(path: Path) -> None:
    """
    Raises:
        MobiusError: the file is not a tar of samples, or is truncated.
    """
    _samples(path)


def _index(folder: Path) -> dict[str, Any]:
    """The "shards" of the folder's index.json; {} if there is none or it is of another program."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise MobiusError(f"cannot read {folder / INDEX}: {error}") from error
    shards = content.get("shards") if isinstance(content, dict) else None
    return shards if isinstance(shards, dict) else {}


def listed_shard(path: Path) -> Shard | None:
    """The shard's record in the index.json of its folder; None if there is none."""
    record = _index(path.parent).get(path.name)
    try:
        return None if record is None else Shard(**record)
    except TypeError as error:
        raise MobiusError(f"{path.parent / INDEX} does not list bytes, sha256 and samples of {path.name}") from error


def _check_size(path: Path, expected: Shard | None) -> None:
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise MobiusError(f"cannot read {path}: {error}") from error
    if expected is not None and size != expected.bytes:
        raise MobiusError(f"{path} has {size} bytes, but {INDEX} lists {expected.bytes}: fetch it again")


def describe_shard(path: Path) -> Shard:
    """The shard's record for an index.json."""
    return Shard(path.stat().st_size, sha256(path), len(_samples(path)))


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
