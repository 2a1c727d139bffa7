"""webdataset shards: tar files in which the members `<key>.<suffix>` of one key are a sample.

Only headers and captions are read here, by the standard library's tarfile, and nothing is unpacked or run.
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
from mobius_train.data.decode import SUFFIXES as CLIPS
from mobius_train.data.entry import Entry
from mobius_train.errors import MobiusError
from mobius_train.files import sha256

INDEX = "index.json"
END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


class Shard(NamedTuple):
    """What an index.json says of a shard."""

    bytes: int
    sha256: str
    samples: int


class Span(NamedTuple):
    """A member's place in its tar."""

    offset: int
    size: int


def read_shards(paths: Sequence[Path], caption_language: str) -> list[Entry]:
    """The samples of all shards, in the order of the shards and within them.

    Where an index.json lies beside a shard and lists it, its size and count must agree.

    Raises:
        MobiusError: a shard is missing, truncated, unlike its index or holds an incomplete sample, or no
            shard holds a clip.
    """
    entries: list[Entry] = []
    for path in paths:
        expected = listed(path)
        _check_size(path, expected)
        samples = _samples(path)
        if expected is not None and expected.samples != len(samples):
            raise MobiusError(
                f"{path} holds {len(samples)} samples but {INDEX} says {expected.samples}: fetch it again"
            )
        with open(path, "rb") as file:
            for key, members in samples.items():
                name = f"{path}/{key}"
                clip, caption = (_only(members, kinds, name) for kinds in (CLIPS, CAPTIONS))
                file.seek(members[caption].offset)
                if members[caption].size > MAX_CAPTION_BYTES:
                    raise MobiusError(
                        f"the caption of {name} has {members[caption].size} bytes: {MAX_CAPTION_BYTES} at most"
                    )
                data = file.read(members[caption].size)
                words = read_caption(data, caption, name, caption_language)
                shape = _shape(data) if caption == ".json" else None
                entries.append(Entry(key, words, path, *members[clip], clip, name + clip, shape))
    if not entries:
        raise MobiusError(f"no clip in {len(paths)} shards, the first {paths[0]}: all are empty")
    return entries


def _shape(data: bytes) -> Shape | None:
    """What a .json that was read before says of its clip, as `tools/prepare_data.py` writes it."""
    record = json.loads(data)
    sizes = [record.get(field) for field in Shape._fields] if isinstance(record, dict) else []
    whole = [size for size in sizes if type(size) is int and size > 0]
    return Shape(*whole) if len(whole) == len(Shape._fields) else None


def _only(members: dict[str, Span], kinds: Sequence[str], name: str) -> str:
    """The one suffix of these kinds; .txt goes before .json, which often says other things as well."""
    found = [kind for kind in kinds if kind in members]
    if kinds is CAPTIONS and found:
        return found[0]
    if len(found) != 1:
        what = "caption" if kinds is CAPTIONS else "clip"
        raise MobiusError(
            f"the sample {name} has {'no' if not found else 'more than one'} {what}: it wants one of"
            f" {' '.join(kinds)} and has {' '.join(sorted(members))}"
        )
    return found[0]


def _samples(path: Path) -> dict[str, dict[str, Span]]:
    """Every member's place, by key and suffix.

    The end is looked at as well, by `ends_at`.
    """
    samples: dict[str, dict[str, Span]] = defaultdict(dict)
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise MobiusError(f"{path} holds {member.name}, which is no ordinary file: write the shard again")
                if member.offset_data + member.size > size:
                    raise MobiusError(f"{path} is truncated inside {member.name}: fetch or write it again")
                name = PurePosixPath(member.name)
                stem, dot, suffix = name.name.partition(".")
                if not stem or not dot:  # hidden files, and names without a suffix: no part of a sample
                    continue
                key, suffix = str(name.with_name(stem)), f".{suffix.lower()}"
                if suffix in samples[key]:
                    raise MobiusError(f"{path} holds {member.name} more than once: keys must differ")
                samples[key][suffix] = Span(member.offset_data, member.size)
            end = tar.offset
        if not ends_at(path, end):
            raise MobiusError(
                f"{path} is truncated or damaged at byte {end}, after {len(samples)} samples: fetch or write it again"
            )
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise MobiusError(
            f"{path} is no whole, uncompressed tar ({error}): fetch or write it again; unpack .gz, which"
            " cannot be read by position"
        ) from error
    except OSError as error:
        raise MobiusError(f"{path} cannot be read: {error}") from error
    return dict(samples)


def ends_at(path: Path, end: int) -> bool:
    """Whether a tar is whole: `tarfile` takes a broken or missing header for the end of the archive.

    Where the last member's data stop there must be two blocks of zeros, which every whole tar has.

    Args:
        end: in bytes, the offset at which `tarfile` stopped.
    """
    with path.open("rb") as file:
        file.seek(end)
        return file.read(len(END_OF_ARCHIVE)) == END_OF_ARCHIVE


def check_whole(path: Path) -> None:
    """
    Raises:
        MobiusError: it is no tar of samples, or is cut off.
    """
    _samples(path)


def _index(folder: Path) -> dict[str, Any]:
    """The "shards" of the folder's index.json; {} where there is none, or another program's."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise MobiusError(f"{folder / INDEX} cannot be read: {error}") from error
    shards = content.get("shards") if isinstance(content, dict) else None
    return shards if isinstance(shards, dict) else {}


def listed(path: Path) -> Shard | None:
    """What an index.json beside a shard says of it; None where there is none, or it says nothing."""
    record = _index(path.parent).get(path.name)
    try:
        return None if record is None else Shard(**record)
    except TypeError as error:
        raise MobiusError(f"{path.parent / INDEX} does not say bytes, sha256 and samples of {path.name}") from error


def _check_size(path: Path, expected: Shard | None) -> None:
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise MobiusError(f"{path} cannot be read: {error}") from error
    if expected is not None and size != expected.bytes:
        raise MobiusError(f"{path} has {size} bytes but {INDEX} says {expected.bytes}: fetch it again")


def describe_shard(path: Path) -> Shard:
    """Size, hash and number of samples, for an index.json."""
    return Shard(path.stat().st_size, sha256(path), len(_samples(path)))


def verify(folder: Path) -> int:
    """Compare every shard that the folder's index.json lists, byte by byte (sha256); returns how many.

    Raises:
        MobiusError: there is no such index, or a shard is missing or differs.
    """
    names = sorted(_index(folder))
    if not names:
        raise MobiusError(f"{folder} has no {INDEX} that lists shards")
    for name in names:
        path = folder / name
        expected = listed(path)
        _check_size(path, expected)
        if describe_shard(path) != expected:
            raise MobiusError(f"{path} is not what {INDEX} says: fetch it again")
    return len(names)
