"""Several sets of clips as one: which clips of each, with which captions, how often, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mobius_train.data.entry import Entry
from mobius_train.data.entry_list import EntryList
from mobius_train.errors import MobiusError, did_you_mean


class NamedSet(NamedTuple):
    """name: its source, for people. repeats: how often each of its clips comes in an epoch."""

    name: str = ""
    repeats: int = 1


def subset_of(entries: Sequence[Entry], names: Sequence[str], field: str) -> EntryList:
    """The clips that have one of the names as their key or as one of their captions, in the same order.

    Args:
        field: of the recipe, for the error.

    Raises:
        MobiusError: a name belongs to no clip.
    """
    found: set[str] = set()
    chosen, wanted = EntryList(), frozenset(names)
    for entry in entries:
        matches = wanted.intersection((entry.key, *(caption.text for caption in entry.captions)))
        if matches:
            found |= matches
            chosen.append(entry)
    for name in names:
        if name not in found:
            known = {text for entry in entries for text in (entry.key, *(caption.text for caption in entry.captions))}
            raise MobiusError(f"{field}: no clip has the caption or the key {name!r}{did_you_mean(name, known)}")
    return chosen


def with_prefix(entries: EntryList, prefix: str) -> EntryList:
    """The clips with trigger words and a space in front of every caption; as they are if there is no prefix."""
    if not prefix.strip():
        return entries
    return EntryList(
        entry._replace(captions=tuple(one._replace(text=f"{prefix.strip()} {one.text}") for one in entry.captions))
        for entry in entries
    )


def joined(sets: Sequence[EntryList]) -> EntryList:
    """The clips of all sets, one set after the other. With several sets a key begins with the number of its set."""
    if len(sets) == 1:
        return sets[0]
    return EntryList(
        entry._replace(key=f"{number}/{entry.key}", set=number)
        for number, entries in enumerate(sets)
        for entry in entries
    )


def first_of_all(entries: EntryList, most: int) -> EntryList:
    """The first clips of every set, in turn, `most` together; all if there are fewer."""
    place_in_set: dict[int, int] = {}
    places = []
    for number in entries.sets.tolist():
        places.append(place_in_set.get(number, 0))
        place_in_set[number] = places[-1] + 1
    order = sorted(range(len(entries)), key=places.__getitem__)
    return entries.chosen(order[:most])
