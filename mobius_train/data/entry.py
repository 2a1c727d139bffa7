"""The location of a clip's bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from mobius_train.data.buckets import Shape
from mobius_train.data.captions import Caption
from mobius_train.data.decode import check_bytes
from mobius_train.errors import MobiusError

BLOCK = 2**20  # bytes of a clip in memory while it is hashed


class Entry(NamedTuple):
    """A clip as `size` bytes at `offset` of a file.

    suffix: its file type. name: its location in messages. shape: its shape, if the data set records it. set: the number
    of its set, if there are several.

    Each read opens the file: forked workers share no handle, no open file is pickled, and thousands of shards do not
    exhaust the process's file handles.
    """

    key: str
    captions: tuple[Caption, ...]
    path: Path
    offset: int
    size: int
    suffix: str
    name: str
    shape: Shape | None = None
    set: int = 0

    def read(self, most: int | None = None) -> bytes:
        """Read all bytes, or the first `most`.

        Raises:
            MobiusError: the file is missing or shorter than before, or the clip is too large to read.
        """
        if most is None:
            check_bytes(self.size, self.suffix, self.name)
        return self._read(self.offset, self.size if most is None else min(most, self.size))

    def read_any(self) -> bytes:
        """Read all bytes without a limit; the caller has checked `size`."""
        return self._read(self.offset, self.size)

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise MobiusError(f"cannot read {self.name}: {error}") from error
        return self.whole(data, size)

    def whole(self, data: bytes, size: int) -> bytes:
        """The data, which have been read for this clip.

        Raises:
            MobiusError: they are fewer than `size` bytes.
        """
        if len(data) < size:
            raise MobiusError(f"{self.name} became shorter after it was opened: restart")
        return data


def hash_clips(entries: Iterable[Entry], ends: int | None = None) -> Iterator[tuple[Entry, bytes]]:
    """Yield each clip with the SHA-256 of its bytes, or of its first and last `ends` bytes. A shard is opened once.

    Raises:
        MobiusError: a file is missing or shorter than before, or a clip is too large to read.
    """
    for path, of_path in groupby(entries, attrgetter("path")):
        first = next(of_path)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise MobiusError(f"cannot read {first.name}: {error}") from error
        try:
            for entry in chain((first,), of_path):
                check_bytes(entry.size, entry.suffix, entry.name)
                yield entry, _hash(entry, file, ends)
        except OSError as error:
            raise MobiusError(f"cannot read {first.name}: {error}") from error
        finally:
            os.close(file)


def _hash(entry: Entry, file: int, ends: int | None) -> bytes:
    """See `hash_clips`."""
    spans = [(0, entry.size)]
    if ends is not None and entry.size > 2 * ends:
        spans = [(0, ends), (entry.size - ends, entry.size)]
    digest = hashlib.sha256()
    for start, stop in spans:
        for place in range(start, stop, BLOCK):
            size = min(BLOCK, stop - place)
            digest.update(entry.whole(os.pread(file, size, entry.offset + place), size))
    return digest.digest()
