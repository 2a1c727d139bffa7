"""Long sequences in a few buffers instead of one Python object for each value.

Ten million clips as objects take gigabytes. Worker processes that are forked share memory until someone writes to it,
and reading an object writes its reference count, so each worker gets a copy of its own in the end. A buffer has none.
"""

from __future__ import annotations

import marshal
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value")


class Listed(Sequence[Value]):
    """A sequence that equals every other one with the same values. A slice of it is a list."""

    @abstractmethod
    def _at(self, index: int) -> Value:
        """The value at an index from 0 to len - 1."""

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> list[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | list[Value]:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else [self._at(place) for place in places]

    def __iter__(self) -> Iterator[Value]:
        return map(self._at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Packed(Listed[Value]):
    """A sequence of any length whose values are text, numbers, None, or tuples of these.

    The form of the bytes is that of this Python version; they are never stored.
    """

    def __init__(self, values: Iterable[Value] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q")
        for value in values:
            self.append(value)

    def append(self, value: Value) -> None:
        self._bytes += marshal.dumps(value)  # type: ignore[arg-type]
        self._ends.append(len(self._bytes))

    def extend(self, other: Packed[Value]) -> None:
        """Append the values of another one, without unpacking them."""
        moved = np.frombuffer(other._ends, np.int64) + len(self._bytes)
        self._ends.frombytes(moved.tobytes())
        self._bytes += other._bytes

    def __len__(self) -> int:
        return len(self._ends)

    def _at(self, index: int) -> Value:
        start = self._ends[index - 1] if index else 0
        value: Value = marshal.loads(memoryview(self._bytes)[start : self._ends[index]])
        return value


class Coded(Listed[Value], Generic[Value]):
    """A sequence of few different values: each value once, and 4 bytes for each place.

    Attributes:
        values: the different values, in the order of their first places.
    """

    def __init__(self, values: Iterable[Value] = ()) -> None:
        codes: dict[Value, int] = {}
        self._codes = array("i", (codes.setdefault(value, len(codes)) for value in values))
        self.values = list(codes)

    @classmethod
    def of(cls, values: Sequence[Value]) -> Coded[Value]:
        """The values in this form; they themselves if they have it."""
        return values if isinstance(values, Coded) else cls(values)

    @property
    def codes(self) -> NDArray[np.int32]:
        """(N,), the number in `values` of each place."""
        return np.frombuffer(self._codes, np.int32)

    def __len__(self) -> int:
        return len(self._codes)

    def _at(self, index: int) -> Value:
        return self.values[self._codes[index]]


def repeated(values: Sequence[str]) -> list[Any]:
    """The values that occur more than once, in the order of their first places; without a set of all values."""
    hashes = np.fromiter(map(hash, values), np.int64, len(values))
    ordered = np.sort(hashes)
    shared = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not shared:
        return []
    counts: dict[str, int] = {}
    for index in np.flatnonzero(np.isin(hashes, list(shared))).tolist():
        counts[values[index]] = counts.get(values[index], 0) + 1
    return [value for value, count in counts.items() if count > 1]
