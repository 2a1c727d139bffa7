"""Files that would block, fill the memory or crash: each is an error that names the file, or is handled."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clip_files import animation, shard, write_tar

from mobius_train.data.clips import ClipDataset, open_clips
from mobius_train.data.decode import decode_clip
from mobius_train.data.patterns import expand_braces, is_remote
from mobius_train.data.texts import clean_text, legible_name
from mobius_train.errors import MobiusError

CLIP = animation(4)


def opened(source: Path | str) -> ClipDataset:
    return open_clips(str(source), num_frames=4, resolution=16)


@contextmanager
def quick() -> Iterator[None]:
    """Two seconds of the processor, and 64 MiB."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < 2
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def refused(source: Path | str, match: str) -> None:
    with quick(), pytest.raises(MobiusError, match=match):
        opened(source)


def folder_of(tmp_path: Path, caption: bytes, suffix: str = ".txt") -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.webp").write_bytes(CLIP)
    (folder / f"a{suffix}").write_bytes(caption)
    return folder


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def test_a_gif_of_a_million_frames_is_refused() -> None:
    head = b"GIF89a" + (1).to_bytes(2, "little") * 2 + bytes([0x80, 0, 0]) + bytes(6)
    frame = b"\x2c" + bytes(4) + (1).to_bytes(2, "little") * 2 + b"\x00\x02\x02\x44\x01\x00"
    data = head + 1_000_000 * frame + b";"
    with quick(), pytest.raises(MobiusError, match=r"bomb\.gif .*too many frames: 65537 or more"):
        decode_clip(data, ".gif", "bomb.gif", num_frames=2, resolution=16)
    # The control: as many as a minute has at 60 per second.
    assert len(decode_clip(head + 3600 * frame + b";", ".gif", "a.gif", num_frames=2, resolution=16)) == 2


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_a_caption_of_two_gigabytes_is_not_read(tmp_path: Path, suffix: str) -> None:
    folder = folder_of(tmp_path, b"", suffix)
    sparse(folder / f"a{suffix}", 2**31)
    refused(folder, rf"a\{suffix}: it has 2147483648 bytes; the limit is 1048576")


@pytest.mark.parametrize(
    ("name", "limit"), [("metadata.jsonl", "67108864 characters; the rest"), ("metadata.csv", "1048576 characters")]
)
def test_a_line_of_gigabytes_is_neither_kept_nor_skipped_to_its_end(tmp_path: Path, name: str, limit: str) -> None:
    folder = folder_of(tmp_path, b"")
    sparse(folder / name, 2**32)
    with quick(), pytest.raises(MobiusError, match=rf"{name} line [12] is .*more than {limit}"):
        opened(folder)


def test_the_lines_after_a_line_without_an_end_of_a_record_are_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, b"")
    long = b'{"file_name": "a.webp", "text": "' + bytes(2**21)
    (folder / "metadata.jsonl").write_bytes(long + b'\n{"file_name": "a.webp", "text": "dog"}\n')
    with pytest.raises(MobiusError, match=r"metadata\.jsonl line 1 is more than 1048576 characters$"):
        opened(folder)


def test_long_csv_fields_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, b"")
    (folder / "metadata.csv").write_text(f"file_name,text\na.webp,dog\na.webp,{'x' * 200_000}\n")
    refused(folder, r"metadata\.csv line 3 is invalid CSV from this line: field larger than")


@pytest.mark.parametrize("text", ['{"text": "a dog", "n": ' + "1" * 5000 + "}", "[" * 100_000, "{"])
def test_json_that_python_cannot_read_is_named(tmp_path: Path, text: str) -> None:
    refused(folder_of(tmp_path, text.encode(), ".json"), r"the caption of .*a\.webp is not valid JSON")
    refused(write_tar(tmp_path / "a.tar", {"k.webp": CLIP, "k.json": text.encode()}), r"a\.tar/k is not valid JSON")
    (tmp_path / "clips" / "metadata.jsonl").write_text(text)
    refused(tmp_path / "clips", r"metadata\.jsonl line 1 is not valid JSON")
    (tmp_path / "index.json").write_text(text)
    refused(tmp_path / "a.tar", r"index\.json")


def test_other_line_separators_do_not_end_a_json_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, b"")
    caption = "one\u2028two\u2029three\u0085four\x0bfive\x0csix\x1cseven"
    records = [{"file_name": "a.webp", "text": caption}]
    (folder / "metadata.jsonl").write_text(json.dumps(records[0], ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert opened(folder)[0].caption == caption


def pax_headers(count: int, size: int = 20) -> bytes:
    """Extended headers in a row, which tarfile reads by recursion, and before a whole sample."""
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, size
    contents = b"20 comment=aaaaaaaa\n"[:size].ljust(-(-min(size, 512) // 512) * 512, b"\0")
    return (header.tobuf() + contents) * count


def test_many_extended_headers_in_a_row_are_refused(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", ["k"]).read_bytes()
    bomb = tmp_path / "bomb.tar"
    bomb.write_bytes(pax_headers(3000) + whole)
    refused(bomb, r"bomb\.tar, after 0 samples: damaged: too many extended headers")
    bomb.write_bytes(pax_headers(3) + whole)
    assert opened(bomb).keys == ["k"]


def test_large_extended_headers_are_not_read(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.tar"
    bomb.write_bytes(pax_headers(1, size=2**31))
    with bomb.open("r+b") as file:
        file.truncate(2**31 + 4096)
    refused(bomb, r"bomb\.tar, after 0 samples: .*a header of 2147483648 bytes")


def test_invalid_utf8_in_captions_is_replaced_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"a.webp": CLIP, "a.txt": b"caf\xe9 noir", "b.webp": CLIP, "b.json": b'{"text": "a \\ud83d dog"}'}
    members |= {"c.webp": CLIP, "c.json": b'{"text": "\\ud83d\\ude00"}', "d.webp": CLIP, "d.txt": "é".encode("utf-16")}
    clips = opened(write_tar(tmp_path / "a.tar", members))
    assert [clips.captions(number)[0] for number in range(4)] == ["caf\ufffd noir", "a \ufffd dog", "😀", "é"]
    assert "2 clips have captions with invalid UTF-8" in caplog.text
    assert "a.tar/a.webp" in caplog.text


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, b"a dog")
    raw = os.fsdecode(b"b-\xff")
    (folder / f"{raw}.webp").write_bytes(CLIP)
    (folder / f"{raw}.txt").write_text("bee")
    clips = opened(folder)
    assert clips.keys == ["a", "b-\\xff"]
    assert clips[1].caption == "bee"
    assert clips.entries[1].name.endswith("b-\\xff.webp")
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "b-\xff.webp", "text": "bee"}\n')
    assert opened(folder).keys == ["b-\\xff"]
    (folder / "metadata.jsonl").write_text('{"file_name": "\\ud800.webp", "text": "bee"}\n')
    refused(folder, r"line 1: there is no file")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for suffix, data in ((".webp", CLIP), (".txt", b"dog")):
            member = tarfile.TarInfo(f"{raw}{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert opened(tmp_path / "a.tar").keys == ["b-\\xff"]


def test_text_is_made_legible() -> None:
    assert clean_text("\ud800a") == "\ufffda"
    assert clean_text("a\udce9") == "a\ufffd"
    assert clean_text("\ud83d\ude00") == "😀"
    assert clean_text("\ufeffé") == "\ufeffé"
    assert legible_name("a\udcffb\n\ud800") == "a\\xed\\xb3\\xbfb\\n\\xed\\xa0\\x80"
    assert legible_name("a\udcff") == "a\\xff"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_and_devices_are_not_opened(
    tmp_path: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path, b"a dog")
    make(folder / "pipe.webp")
    assert opened(folder).keys == ["a"]
    assert "1 broken links, pipes and devices (pipe.webp)" in caplog.text
    make(folder / "metadata.csv")
    refused(folder, r"metadata\.csv is not a file")
    make(tmp_path / "a.tar")
    refused(tmp_path / "a.tar", r"a\.tar is not a file")
    shard(tmp_path / "b.tar", ["k"])
    make(tmp_path / "index.json")
    refused(tmp_path / "b.tar", r"index\.json: not a regular file")


@pytest.mark.parametrize(
    "source", ["a-{0..999999999}.tar", "a-{0..99999999999999}.tar", "{0..9999}-{0..9999}", "a-{" + "1" * 5000 + "..2}"]
)
def test_braces_for_more_files_than_there_are_stop(source: str) -> None:
    start = time.process_time()
    with pytest.raises(MobiusError, match="more than 262144 names"):
        opened(source)
    assert time.process_time() - start < 2
    with pytest.raises(MobiusError, match="more than 262144 names"):
        is_remote(f"https://host/{source}")
    assert len(expand_braces("a-{000000..009999}.tar")) == 10_000
