"""Clips in tar and zip archives, and in webdataset shards.

An uncompressed tar is read in place. The contents of a compressed archive are written to a single file in the work
folder, so member names never become paths.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from pydantic import Field

from mobius_train.config_sections import Section
from mobius_train.data.patterns import local_paths
from mobius_train.data.tar_members import DamagedTar, tar_members
from mobius_train.data.texts import is_regular
from mobius_train.errors import MobiusError
from mobius_train.prepare.candidate import Drop
from mobius_train.prepare.sources.reference import STAGE, Member, Reference, pair_captions, refused_input

MAX_UNPACKED = 2**36  # total bytes of the members of one compressed archive
# Clips are compressed already. An archive that unpacks to more than these bytes, and to more than this multiple of its
# size, is a bomb.
BOMB_BYTES, BOMB_RATIO = 2**28, 50
COMPRESSED: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# Damaged archives raise errors of zlib, lzma and the archive formats, which have no common class.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, RuntimeError)


class Archive(Section):
    """Archives given by path, glob or braces: .tar, .tgz, .tar.gz, .tar.xz, .zip; a.txt is the caption of a.gif."""

    kind: Literal["archive"]
    path: str
    captions: Literal["required", "optional"] = "required"
    max_unpacked_bytes: int = Field(MAX_UNPACKED, ge=1, description="total of the members of one compressed archive")

    def references(self, work: Path) -> list[Reference]:
        """
        Raises:
            MobiusError: nothing matches the path, or a compressed archive is larger than the limit.
        """
        paths = paths_of(self.path)
        return [r for path in paths for r in references(path, work, self.max_unpacked_bytes)]


class Shards(Section):
    """webdataset shards given by path, glob or braces; members with equal names up to the first dot form a sample."""

    kind: Literal["webdataset"]
    path: str
    captions: Literal["required", "optional"] = "required"

    def references(self, work: Path) -> list[Reference]:
        """
        Raises:
            MobiusError: nothing matches the path.
        """
        return [r for path in paths_of(self.path) for r in references(path, work, MAX_UNPACKED, shards=True)]


def paths_of(pattern: str) -> list[Path]:
    """Local files that match a pattern (see `local_paths`); `~` is the home folder."""
    return local_paths(str(Path(pattern).expanduser()))


def references(path: Path, work: Path, max_bytes: int, shards: bool = False) -> list[Reference]:
    """The clips of one archive. If it is damaged, the last reference describes the problem."""
    if not is_regular(path):
        return [refused_input(path.name, str(path), "no file", "a folder, a pipe or a device")]
    try:
        opened = _opener(path)
        if zipfile.is_zipfile(path):
            members = _zip(path, work, max_bytes)
        elif opened is not None:
            members = _compressed_tar(path, opened, work, max_bytes)
        else:
            members = list(_tar(path, path.name))
    except OSError as error:
        return [refused_input(path.name, str(path), "unreadable", error.strerror or str(error))]
    return pair_captions(members, f"{path}!", shards)


def _opener(path: Path) -> Callable[[Path], Any] | None:
    with path.open("rb") as file:
        head = file.read(6)
    return next((opener for magic, opener in COMPRESSED.items() if head.startswith(magic)), None)


def _broken(name: str, path: Path, error: object) -> Member:
    return Member(name, path, 0, 0, Drop(STAGE, "damaged", f"the archive: {error}"))


def _tar(path: Path, name: str) -> Iterator[Member]:
    """The members; a damaged archive yields one more, named `name`, with the problem."""
    size = path.stat().st_size
    try:
        for member in tar_members(path):
            problem = _problem(member)
            if problem is None and not member.isdir() and member.offset_data + member.size > size:
                problem = Drop(STAGE, "truncated", "the archive ends inside this member")
            if problem is not None or not member.isdir():
                yield Member(member.name, path, member.offset_data, member.size, problem)
    except DamagedTar as error:
        yield _broken(name, path, error)


def _problem(member: tarfile.TarInfo) -> Drop | None:
    """The reason not to read a member. Links are never followed here, but are rejected all the same."""
    if member.issym() or member.islnk():
        return Drop(STAGE, "link", f"to {member.linkname}")
    if not (member.isreg() or member.isdir()) or member.issparse():
        return Drop(STAGE, "no file", "a device, a pipe or a sparse file")
    return _traversal(member.name)


def _traversal(name: str) -> Drop | None:
    path = PurePosixPath(name.replace("\\", "/"))
    outside = path.is_absolute() or ".." in path.parts
    return Drop(STAGE, "path traversal", "the name points outside the archive") if outside else None


def _compressed_tar(path: Path, opened: Callable[[Path], Any], work: Path, max_bytes: int) -> list[Member]:
    problem: object = None
    with _unpacked(path, work).open("wb") as file, opened(path) as packed:
        try:
            _copy(packed, file, _limit(path, max_bytes))
        except _TooLarge as error:
            raise _too_large_error(path, max_bytes) from error
        except DAMAGED as error:
            _raise_disk_error(error)
            problem = error
    members = list(_tar(_synced(_unpacked(path, work)), path.name))
    return members if problem is None else [*members, _broken(path.name, path, problem)]


def _zip(path: Path, work: Path, max_bytes: int) -> list[Member]:
    members: list[Member] = []
    target = _unpacked(path, work)
    target.touch()
    try:
        with zipfile.ZipFile(path) as archive, target.open("wb") as file:
            if sum(member.file_size for member in archive.infolist()) > _limit(path, max_bytes):
                raise _too_large_error(path, max_bytes)
            for member in archive.infolist():
                problem = _traversal(member.filename)
                if member.flag_bits & 1:
                    problem = Drop(STAGE, "unreadable", "encrypted")
                start = file.tell()
                if problem is None and not member.is_dir():
                    try:
                        with archive.open(member) as contents:
                            _copy(contents, file, _limit(path, max_bytes) - start)
                    except _TooLarge as error:
                        raise _too_large_error(path, max_bytes) from error
                    except (*DAMAGED, NotImplementedError) as error:
                        _raise_disk_error(error)
                        problem = Drop(STAGE, "damaged", str(error))
                        file.seek(start)
                        file.truncate()
                if problem is not None or not member.is_dir():
                    members.append(Member(member.filename, target, start, file.tell() - start, problem))
    except DAMAGED as error:
        _raise_disk_error(error)
        members.append(_broken(path.name, path, error))
    _synced(target)
    return members


def _synced(path: Path) -> Path:
    """Sync the file to disk before the listing refers to it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def _unpacked(path: Path, work: Path) -> Path:
    """The file for the contents of a compressed archive."""
    return work / f"unpacked-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"


class _TooLarge(Exception):
    """An archive unpacks to more bytes than allowed."""


def _limit(path: Path, max_bytes: int) -> int:
    """The bytes that an archive may unpack to."""
    return min(max_bytes, max(BOMB_BYTES, BOMB_RATIO * path.stat().st_size))


def _too_large_error(path: Path, max_bytes: int) -> MobiusError:
    limit = _limit(path, max_bytes)
    way = "raise max_unpacked_bytes" if limit == max_bytes else "it is no archive of clips; remove it, or unpack it"
    return MobiusError(f"{path} of {path.stat().st_size} bytes unpacks to more than {limit} bytes: {way}")


def _raise_disk_error(error: BaseException) -> None:
    """Re-raise an error of the local disk, which does not mean a damaged archive."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _copy(contents: IO[bytes], file: IO[bytes], max_bytes: int) -> None:
    left = max_bytes
    while part := contents.read(2**20):
        left -= len(part)
        if left < 0:
            raise _TooLarge
        file.write(part)
