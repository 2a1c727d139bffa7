"""Many clips in few buffers: what is packed comes back, whole and in parts."""

import hashlib
import pickle
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from mobius_train.data import entry as entry_module
from mobius_train.data.buckets import Shape
from mobius_train.data.captions import Caption
from mobius_train.data.entry import Entry, hash_clips
from mobius_train.data.entry_list import EntryList
from mobius_train.data.packed import Coded, Packed, repeated
from mobius_train.errors import MobiusError

SHARD, ODD = Path("a/train-0.tar"), Path("a/\udcff.gif")
ENTRIES = [
    Entry("a", (Caption("a red dog"),), SHARD, 512, 10, ".gif", "a/train-0.tar/a.gif"),
    Entry("b", (Caption("a dog", 3.0), Caption("ein Hünd\0", 0.1)), SHARD, 2**40, 0, ".gif", "other", Shape(8, 16, 9)),
    Entry("1/c", (Caption("犬"),), ODD, 0, 7, ".gif", "a/\\xff.gif", set=1),
    Entry("d", (Caption("\udc80"),), SHARD, 2**33, 10, ".webp", "a/train-0.tar/d.webp"),
]


def test_an_entry_list_holds_exactly_its_entries() -> None:
    entries = EntryList(ENTRIES)
    assert list(entries) == ENTRIES == entries
    assert entries[-1] == ENTRIES[3]
    assert entries[1:3] == ENTRIES[1:3]
    assert list(entries.keys) == ["a", "b", "1/c", "d"]
    assert (entries.sets.tolist(), list(entries.with_several_captions)) == ([0, 0, 1, 0], [1])
    assert entries.chosen([2, 0]) == [ENTRIES[2], ENTRIES[0]]
    assert pickle.loads(pickle.dumps(entries)) == ENTRIES
    # The controls.
    assert entries != ENTRIES[:3]
    assert entries != [*ENTRIES[:3], ENTRIES[3]._replace(size=11)]
    with pytest.raises(IndexError):
        entries[4]


@pytest.mark.parametrize("cut", range(5))
def test_lists_are_joined(cut: int) -> None:
    joined = EntryList(ENTRIES[:cut])
    joined.extend(EntryList(ENTRIES[cut:]))
    joined.append(ENTRIES[0])
    assert joined == [*ENTRIES, ENTRIES[0]]
    assert (joined.sets.tolist(), list(joined.with_several_captions)) == ([0, 0, 1, 0, 0], [1])


def test_a_clip_takes_few_bytes_beside_its_caption() -> None:
    caption = "a caption of forty characters, numbered "
    entries = EntryList(
        Entry(f"{i:08d}", (Caption(f"{caption}{i:08d}"),), SHARD, i * 2048, 900, ".gif", f"{SHARD}/{i:08d}.gif")
        for i in range(1000)
    )
    assert len(pickle.dumps(entries)) / 1000 < len(caption) + 8 + 100


def test_few_different_values_are_coded() -> None:
    values = [Shape(8, 16, 16), Shape(4, 9, 9), Shape(8, 16, 16)]
    coded = Coded(values)
    assert (list(coded), coded.values, coded.codes.tolist()) == (values, values[:2], [0, 1, 0])
    assert Coded.of(coded) is coded
    assert Coded.of(values) == values != coded[:2]
    assert coded.codes.dtype == np.int32
    assert (len(Coded()), len(Coded().codes), len(Packed())) == (0, 0, 0)


def test_repeated_values_are_found_in_order_also_when_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    values = ["c", "a", "b", "c", "b", "d", "c"]
    assert repeated(Packed(values)) == ["c", "b"]
    assert repeated(["a", "b"]) == repeated([]) == []
    monkeypatch.setattr("builtins.hash", lambda value: 7)
    assert repeated(values) == ["c", "b"]
    assert repeated(["a", "b"]) == []


def test_a_shard_is_opened_once_for_the_hashes_of_its_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in ("a.tar", "b.tar")]
    for path in paths:
        path.write_bytes(bytes(range(100)))
    entries = [
        Entry("k", (), path, offset, size, ".gif", f"{path}/k")
        for path in paths
        for offset, size in ((0, 4), (10, 6), (50, 0))
    ]
    opened, system_open = count(), entry_module.os.open

    def counted(*args: object) -> int:
        next(opened)
        return system_open(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(entry_module.os, "open", counted)
    found = [content for _, content in hash_clips(entries)]
    parts = [bytes([0, 1, 2, 3]), bytes([10, 11, 12, 13, 14, 15]), b""]
    assert found == [hashlib.sha256(part).digest() for part in parts] * 2
    assert next(opened) == 2
    with pytest.raises(MobiusError, match=r"long.*shorter"):
        list(hash_clips([entries[0]._replace(offset=98, name="long")]))


def test_the_ends_of_a_clip_are_hashed_alone_if_they_are_not_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "clip.gif"
    path.write_bytes(bytes(range(10)))
    entry = Entry("k", (), path, 0, 10, ".gif", "clip.gif")
    for ends, content in ((2, [0, 1, 8, 9]), (4, [0, 1, 2, 3, 6, 7, 8, 9]), (5, range(10)), (99, range(10))):
        ((_, found),) = hash_clips([entry], ends)
        assert found == hashlib.sha256(bytes(content)).digest(), ends
