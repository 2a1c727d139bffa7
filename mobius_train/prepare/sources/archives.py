"""Clips in tar and zip archives, and in webdataset shards.

An uncompressed tar is read where it lies. A compressed one is unpacked once into the work folder under numbers, so
that no name of a member ever becomes a path.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

from braceexpand import braceexpand
from pydantic import Field

from mobius_train.config import Section
from mobius_train.data.decode import MAX_VIDEO_BYTES
from mobius_train.data.source import SCHEME
from mobius_train.errors import MobiusError
from mobius_train.prepare.clip import Drop
from mobius_train.prepare.sources.reference import STAGE, Member, Reference, pair, refuse

TAR_END = bytes(2 * tarfile.BLOCKSIZE)


class Archive(Section):
    """Archives by path, glob or braces: .tar, .tgz, .tar.gz, .tar.xz, .zip; a.txt is the caption of a.gif."""

    kind: Literal["archive"]
    path: str
    captions: Literal["required", "optional"] = "required"
    max_unpacked_bytes: int = Field(2**36, ge=1, description="of all members of one compressed archive")

    def references(self, work: Path) -> list[Reference]:
        """
        Raises:
            MobiusError: nothing matches the path, or a compressed archive is larger than the limit.
        """
        paths = expand(self.path)
        return [r for path in paths for r in references(path, work, self.max_unpacked_bytes)]


class Shards(Section):
    """webdataset shards by path, glob or braces; what belongs together is told by the name before the first dot."""

    kind: Literal["webdataset"]
    path: str
    captions: Literal["required", "optional"] = "required"

    def references(self, work: Path) -> list[Reference]:
        """
        Raises:
            MobiusError: nothing matches the path.
        """
        return [r for path in expand(self.path) for r in references(path, work, 2**36, shards=True)]


def expand(pattern: str) -> list[Path]:
    """
    Raises:
        MobiusError: nothing is there, or the pattern is no local path.
    """
    if SCHEME.match(pattern):
        raise MobiusError(f"{pattern!r} is no local path; nothing was run or fetched")
    found = [Path(p) for part in braceexpand(str(Path(pattern).expanduser())) for p in sorted(glob.glob(part))]
    if not found:
        raise MobiusError(f"there is no file {pattern}")
    return found


def references(path: Path, work: Path, max_bytes: int, shards: bool = False) -> list[Reference]:
    """The clips of one archive; where it is broken, a reference says so behind those that could be read."""
    try:
        if zipfile.is_zipfile(path):
            members = _unpacked(path, work, max_bytes, _zip(path))
        elif _compressed(path):
            members = _unpacked(path, work, max_bytes, _tar_stream(path))
        else:
            members = list(_tar(path))
    except OSError as error:
        return [refuse(path.name, str(path), "unreadable", error.strerror or str(error))]
    return pair(members, f"{path}!", shards)


def _compressed(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(6)
    return head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"))


def _broken(path: Path, error: object) -> Member:
    return Member(path.name, path, 0, 0, Drop(STAGE, "damaged", f"the archive: {error}"))


def _tar(path: Path) -> Iterator[Member]:
    """tarfile takes a broken header for the end of the archive, so that the end is looked at here."""
    size, end = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                problem = _problem(member)
                if problem is None and not member.isdir() and member.offset_data + member.size > size:
                    problem = Drop(STAGE, "truncated", "the archive ends inside of it")
                if problem is not None or not member.isdir():
                    yield Member(member.name, path, member.offset_data, member.size, problem)
                end = tar.offset
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        yield _broken(path, error)
        return
    with path.open("rb") as file:
        file.seek(end)
        if file.read(len(TAR_END)) != TAR_END:
            yield _broken(path, f"truncated or damaged at byte {end}")


def _problem(member: tarfile.TarInfo) -> Drop | None:
    """Members that lead elsewhere are not read, though nothing here would follow them."""
    if member.issym() or member.islnk():
        return Drop(STAGE, "link", f"to {member.linkname}")
    if not (member.isreg() or member.isdir()) or member.issparse():
        return Drop(STAGE, "no file", "a device, a pipe or a sparse file")
    return _traversal(member.name)


def _traversal(name: str) -> Drop | None:
    path = PurePosixPath(name.replace("\\", "/"))
    outside = path.is_absolute() or ".." in path.parts
    return Drop(STAGE, "path traversal", "the name leads out of the archive") if outside else None


class _Packed(NamedTuple):
    """A member's name and, unless there is a problem, its open contents."""

    name: str
    contents: IO[bytes] | None
    problem: Drop | None


def _tar_stream(path: Path) -> Iterator[_Packed]:
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            problem = _problem(member)
            if problem is not None:
                yield _Packed(member.name, None, problem)
            elif member.isreg():
                yield _Packed(member.name, tar.extractfile(member), None)


def _zip(path: Path) -> Iterator[_Packed]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            problem = _traversal(member.filename)
            if member.flag_bits & 1:
                problem = Drop(STAGE, "unreadable", "encrypted")
            if problem is not None:
                yield _Packed(member.filename, None, problem)
                continue
            with archive.open(member) as contents:
                yield _Packed(member.filename, contents, None)


def _unpacked(path: Path, work: Path, max_bytes: int, packed: Iterator[_Packed]) -> list[Member]:
    """Members as numbered files of a folder in `work`.

    Raises:
        MobiusError: all members together are more than `max_bytes`.
    """
    folder = work / f"unpacked-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    members: list[Member] = []
    total = 0
    try:
        for number, (name, contents, problem) in enumerate(packed):
            target = folder / f"{number:08d}"
            if problem is not None or contents is None:
                members.append(Member(name, path, 0, 0, problem))
                continue
            size = _copy(contents, target)
            if size is None:
                problem = Drop(STAGE, "too large", f"more than {MAX_VIDEO_BYTES} bytes")
                target.unlink()
                members.append(Member(name, path, 0, 0, problem))
                continue
            total += size
            if total > max_bytes:
                raise MobiusError(f"{path} unpacks to more than {max_bytes} bytes: raise max_unpacked_bytes")
            members.append(Member(name, target, 0, size))
    # What a damaged archive raises is not one family: zlib's, lzma's, the formats' own.
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the archive
        members.append(_broken(path, error))
    return members


def _copy(contents: IO[bytes], target: Path) -> int | None:
    """Bytes written; None where they are more than any clip may have."""
    size = 0
    with target.open("wb") as file:
        while part := contents.read(2**20):
            size += len(part)
            if size > MAX_VIDEO_BYTES:
                return None
            file.write(part)
        os.fsync(file.fileno())
    return size
