"""Where a clip's bytes are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mobius_train.data.buckets import Shape
from mobius_train.data.captions import Caption
from mobius_train.data.decode import check_bytes
from mobius_train.errors import MobiusError


class Entry(NamedTuple):
    """A clip as `size` bytes at `offset` of a file; `suffix` says what it is, `name` where a person finds it.

    `shape` is what the data set says that the file holds, if it says it.

    A file is opened for each read: nothing is shared between forked workers, nothing open is pickled, and
    thousands of shards do not use up the process's file handles.
    """

    key: str
    captions: tuple[Caption, ...]
    path: Path
    offset: int
    size: int
    suffix: str
    name: str
    shape: Shape | None = None

    def read(self, most: int | None = None) -> bytes:
        """All bytes, or the first `most`.

        Raises:
            MobiusError: the file is gone or has become shorter, or the clip is too large to be read.
        """
        if most is None:
            check_bytes(self.size, self.suffix, self.name)
        return self._read(self.offset, self.size if most is None else min(most, self.size))

    def read_any(self) -> bytes:
        """All bytes, however many: the caller has looked at `size`."""
        return self._read(self.offset, self.size)

    def read_end(self, most: int) -> bytes:
        """The last `most` bytes."""
        size = min(most, self.size)
        return self._read(self.offset + self.size - size, size)

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise MobiusError(f"{self.name} cannot be read: {error}") from error
        if len(data) < size:
            raise MobiusError(f"{self.name} has become shorter since it was opened: start again")
        return data
