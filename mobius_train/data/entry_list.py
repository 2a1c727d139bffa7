"""The clips of a data set in memory: about a hundred bytes and its caption's text for each."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobius_train.data.buckets import Shape
from mobius_train.data.captions import Caption
from mobius_train.data.entry import Entry
from mobius_train.data.packed import Listed, Packed


class EntryList(Listed[Entry]):
    """Entries, made when they are asked for.

    Attributes:
        keys: of all entries.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.keys: Packed[str] = Packed()
        self._rows: Packed[Any] = Packed()
        # Entries of one shard follow each other: the place of the first entry of each path.
        self._paths: Packed[str] = Packed()
        self._starts = array("q")
        self._last: str | None = None
        self._sets = array("i")
        self._several = array("q")
        for entry in entries:
            self.append(entry)

    def append(self, entry: Entry) -> None:
        path = str(entry.path)
        if path != self._last:
            self._paths.append(path)
            self._starts.append(len(self))
            self._last = path
        if len(entry.captions) > 1:
            self._several.append(len(self))
        # The most frequent name takes one byte.
        name = None if entry.name == f"{path}/{entry.key}{entry.suffix}" else entry.name
        shape = None if entry.shape is None else tuple(entry.shape)
        captions = tuple(map(tuple, entry.captions))
        self._rows.append((captions, entry.offset, entry.size, entry.suffix, name, shape))
        self._sets.append(entry.set)
        self.keys.append(entry.key)

    def extend(self, other: EntryList) -> None:
        """Append the entries of another list, without unpacking them."""
        count = len(self)
        for own, places in ((self._starts, other._starts), (self._several, other._several)):
            own.frombytes((np.frombuffer(places, np.int64) + count).tobytes())
        self._paths.extend(other._paths)
        self._rows.extend(other._rows)
        self._sets.extend(other._sets)
        self.keys.extend(other.keys)
        self._last = other._last if len(other) else self._last

    def __len__(self) -> int:
        return len(self._sets)

    def _at(self, index: int) -> Entry:
        captions, offset, size, suffix, name, shape = self._rows[index]
        path = self._paths[bisect_right(self._starts, index) - 1]
        key = self.keys[index]
        return Entry(
            key,
            tuple(Caption(*caption) for caption in captions),
            Path(path),
            offset,
            size,
            suffix,
            f"{path}/{key}{suffix}" if name is None else name,
            None if shape is None else Shape(*shape),
            self._sets[index],
        )

    @property
    def sets(self) -> NDArray[np.int32]:
        """(N,), the number of each entry's set."""
        return np.frombuffer(self._sets, np.int32)

    @property
    def with_several_captions(self) -> Sequence[int]:
        """The places of the entries that have more than one caption, in ascending order."""
        return self._several

    def chosen(self, places: Iterable[int]) -> EntryList:
        """The entries at these places."""
        return EntryList(self[place] for place in places)
