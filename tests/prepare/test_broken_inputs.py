"""Each broken input is named in index and report, with a reason; the whole ones beside it become clips."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
from PIL import Image

from mobius_train.errors import MobiusError
from mobius_train.prepare.listing import open_inputs
from mobius_train.prepare.preparation import prepare_data
from mobius_train.prepare.sources import archives


def _gif_bomb() -> bytes:
    """480 bytes that claim 20 frames of 9000x9000."""
    frame = (
        b"\x21\xf9\x04\x00\x0a\x00\x00\x00"
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 9000, 9000, 0)
        + b"\x02\x02\x44\x01\x00"
    )
    return b"GIF89a" + struct.pack("<HHBBB", 9000, 9000, 0x80, 0, 0) + bytes(6) + 20 * frame + b"\x3b"


def _many_frames(count: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + count * frame + b"\x3b"


def _growing_gif() -> bytes:
    """Frames that reach beyond the canvas, from the second on."""
    colours = bytes([0, 0, 0, 255, 255, 255])
    head = b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0x80, 0, 0) + colours
    frames = b""
    for number in range(8):
        side = 32 if number else 16
        buffer = io.BytesIO()
        halves = np.repeat(np.array([[number % 2, 1 - number % 2]], np.uint8).repeat(side // 2, axis=1), side, axis=0)
        picture = Image.frombytes("P", (side, side), halves.tobytes())
        picture.putpalette(colours)
        picture.save(buffer, "GIF")
        data = buffer.getvalue()
        start = data.index(b"\x2c" + struct.pack("<HHHH", 0, 0, side, side))
        frames += b"\x21\xf9\x04\x00\x05\x00\x00\x00" + data[start:-1]
    return head + frames + b"\x3b"


def _transparent() -> bytes:
    frames = [Image.fromarray(frame).convert("RGBA") for frame in made.moving(seed=31)]
    for frame in frames:
        frame.paste((0, 0, 0, 0), (0, 16, 32, 32))
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=40, lossless=True)
    return buffer.getvalue()


def _palette() -> bytes:
    frames = [Image.fromarray(frame).quantize(16) for frame in made.moving(seed=32)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=40)
    return buffer.getvalue()


def _deep() -> bytes:
    """A 16-bit still."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


_ONE_PIXEL = np.arange(0, 240, 30, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
GOOD = made.animation(made.moving(seed=99))

# name: (contents, (stage, reason)), or (contents, None) for what is odd but becomes a clip
FILES = {
    "truncated.webp": (GOOD[: len(GOOD) // 2], ("decode", "damaged")),
    "truncated_gif.gif": (made.animation(made.moving(seed=5), "GIF")[:300], ("decode", "damaged")),
    "truncated_video.mp4": (made.video(made.moving(30))[:600], ("decode", "damaged")),
    "empty.gif": (b"", ("decode", "empty")),
    "text_named.gif": (b"this is no picture", ("decode", "unknown kind")),
    "playlist.mp4": (b"#EXTM3U\nfile:///etc/passwd\n", ("decode", "unknown kind")),
    "bomb.gif": (_gif_bomb(), ("decode", "too large")),
    "huge_count.gif": (_many_frames(300_000), ("decode", "too many frames")),
    "one_frame.webp": (made.animation(made.moving(1)), ("decode", "still")),
    "deep16.png": (_deep(), ("decode", "still")),
    "four_frames.webp": (made.animation(made.moving(4)), ("decode", "too few frames")),
    "tiny1x1.webp": (made.animation(_ONE_PIXEL), ("buckets", "too small")),
    "webp_named.gif": (made.animation(made.moving(seed=40)), None),
    "odd.webp": (made.animation(made.moving(size=(33, 47), seed=41)), None),
    "alpha.webp": (_transparent(), None),
    "palette.gif": (_palette(), None),
    "zero_duration.gif": (made.animation(made.moving(seed=42), "GIF", 0), None),
    "apng.png": (made.animation(made.moving(seed=43), "PNG"), None),
    "no_codec.avi": (made.video(made.moving(12), "avi").replace(b"FMP4", b"zzzz"), ("decode", "no picture")),
    "clip.avi": (made.video(made.moving(12, (64, 48), seed=44), "avi"), None),
    "growing.gif": (_growing_gif(), None),
}  # fmt: skip


# Its output, the index's rows by origin, and the report.
Prepared = tuple[Path, dict[str, dict[str, Any]], str]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    folder = tmp_path / "heap"
    folder.mkdir()
    for name, (contents, _) in FILES.items():
        (folder / name).write_bytes(contents)
        (folder / name).with_suffix(".txt").write_text(f"words about {name}", encoding="utf-8")
    for name, caption in {"latin1": b"caf\xe9", "blank": b"  \n", "bom": b"\xef\xbb\xbfwords"}.items():
        (folder / f"{name}.webp").write_bytes(made.animation(made.moving(seed=len(name) + 50)))
        (folder / f"{name}.txt").write_bytes(caption)
    (folder / "bare.webp").write_bytes(made.animation(made.moving(seed=60)))
    (folder / "orphan.txt").write_text("a caption alone")
    (folder / "notes.docx").write_bytes(b"?")
    outside = tmp_path / "secret.webp"
    outside.write_bytes(GOOD)
    (folder / "escape.webp").symlink_to(outside)
    (folder / "broken_link.webp").symlink_to(folder / "nowhere.webp")
    (folder / "linked_folder").symlink_to(tmp_path)
    (folder / "loop.webp").symlink_to(folder / "loop.webp")
    os.mkfifo(folder / "pipe.webp")
    (folder / "folder.webp").mkdir()
    (folder / os.fsdecode(b"name-\xff.webp")).write_bytes(made.animation(made.moving(seed=61)))
    (folder / os.fsdecode(b"name-\xff.txt")).write_text("a file whose name is no UTF-8")
    output = tmp_path / "out"
    before = set(tmp_path.rglob("*"))
    prepare_data(made.recipe(output, {"kind": "folder", "path": str(folder)}))
    assert {path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(output)} == set()
    rows = {row["origin"].removeprefix(f"{folder}/"): row for row in made.rows(output)}
    return output, rows, (output / "report" / "report.md").read_text(encoding="utf-8")


def test_every_broken_file_is_named_with_its_reason(prepared: Prepared) -> None:
    _, rows, report = prepared
    expected = {name: why for name, (_, why) in FILES.items() if why} | {
        "blank.webp": ("source", "empty caption"),
        "bare.webp": ("source", "no caption"),
        "orphan.txt": ("source", "missing member"),
        "notes.docx": ("source", "no clip"),
        "escape.webp": ("source", "link"),
        "broken_link.webp": ("source", "link"),
        "linked_folder": ("source", "link"),
        "loop.webp": ("source", "link"),
        "pipe.webp": ("source", "no file"),
    }
    assert {name: (rows[name]["stage"], rows[name]["reason"]) for name in expected} == expected
    for name in expected:
        assert name in report


def test_odd_but_whole_files_become_clips(prepared: Prepared) -> None:
    _, rows, report = prepared
    whole = [name for name, (_, why) in FILES.items() if why is None] + ["bom.webp", "latin1.webp", "name-\\xff.webp"]
    assert {name: rows[name]["reason"] for name in whole} == dict.fromkeys(whole)
    assert rows["webp_named.gif"]["notes"] == ["wrong extension: webp named .gif"]
    assert rows["zero_duration.gif"]["notes"] == ["zero duration"]
    assert rows["growing.gif"]["notes"] == ["canvas changes"]
    assert rows["bom.webp"]["captions"] == {"en": "words"}
    assert rows["latin1.webp"]["captions"] == {"en": "caf\ufffd"}
    assert rows["latin1.webp"]["notes"] == ["invalid UTF-8 in the caption: replaced by \ufffd"]
    for note, name in {
        "wrong extension": "webp_named",
        "zero duration": "zero_dur",
        "canvas changes": "growing",
    }.items():
        assert re.search(rf"- {note} \(1\):\n  - `[^`]*/{name}", report), note


def test_nothing_is_lost(prepared: Prepared) -> None:
    output, rows, _ = prepared
    index = json.loads((output / "index.json").read_text(encoding="utf-8"))
    dropped = sum(sum(whys.values()) for whys in index["dropped"].values())
    assert index["inputs"] == len(rows) == index["kept"] + dropped
    assert sum(shard["samples"] for shard in index["shards"].values()) == index["kept"]


def _tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _members() -> list[tuple[tarfile.TarInfo, bytes]]:
    link = tarfile.TarInfo("link.webp")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("device.webp")
    device.type = tarfile.CHRTYPE
    return [
        (tarfile.TarInfo("good.webp"), made.animation(made.moving(seed=70))),
        (tarfile.TarInfo("good.txt"), b"words"),
        (tarfile.TarInfo("../escaped.webp"), GOOD),
        (tarfile.TarInfo("/tmp/absolute.webp"), GOOD),
        (link, b""),
        (device, b""),
        (tarfile.TarInfo("twice.webp"), made.animation(made.moving(seed=71))),
        (tarfile.TarInfo("twice.txt"), b"words"),
        (tarfile.TarInfo("twice.webp"), GOOD),
        (tarfile.TarInfo("alone.txt"), b"words"),
    ]


def _reasons(output: Path, archive: Path) -> dict[str, str | None]:
    """Why each member of it, and the archive itself, was dropped."""
    prepare_data(made.recipe(output, {"kind": "archive", "path": str(archive)}))
    return {
        row["origin"].partition("!")[2].replace(str(archive), archive.name): row["reason"] for row in made.rows(output)
    }


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_hostile_members_of_archives_are_named_and_land_nowhere(tmp_path: Path, ending: str) -> None:
    path = _tar(tmp_path / f"heap.{ending}", _members(), "w:gz" if ending == "tar.gz" else "w")
    output = tmp_path / "out"
    before = set(tmp_path.iterdir())
    prepare_data(made.recipe(output, {"kind": "archive", "path": str(path)}))
    found: dict[str, list[str | None]] = {}
    for row in made.rows(output):
        found.setdefault(row["origin"].partition("!")[2], []).append(row["reason"])
    assert found == {
        "good.webp": [None],
        "../escaped.webp": ["path traversal"],
        "/tmp/absolute.webp": ["path traversal"],
        "link.webp": ["link"],
        "device.webp": ["no file"],
        "twice.webp": ["duplicate key", None],
        "alone.txt": ["missing member"],
    }
    assert set(tmp_path.iterdir()) - before == {output}
    assert not list(output.rglob("*escaped*"))


def test_an_archive_that_breaks_off_gives_what_it_has(tmp_path: Path) -> None:
    path = _tar(tmp_path / "heap.tar", [m for m in _members() if m[0].name.startswith(("good", "twice"))][:4])
    with tarfile.open(path) as tar:
        end = tar.getmember("twice.webp").offset_data + 10
    path.write_bytes(path.read_bytes()[:end])
    assert _reasons(tmp_path / "out", path) == {"good.webp": None, "twice.webp": "truncated", "heap.tar": "damaged"}


@pytest.mark.parametrize("ending", ["gz", "xz", "bz2"])
def test_a_compressed_archive_that_breaks_off_gives_what_it_has(tmp_path: Path, ending: str) -> None:
    filler = (tarfile.TarInfo("filler.bin"), np.random.default_rng(0).bytes(3_000_000))
    path = _tar(tmp_path / f"heap.tar.{ending}", [*_members()[:2], filler], f"w:{ending}")
    path.write_bytes(path.read_bytes()[:-1_000_000])
    assert _reasons(tmp_path / "out", path) == {
        "good.webp": None,
        "filler.bin": "truncated",
        f"heap.tar.{ending}": "damaged",
    }


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    path = _tar(tmp_path / "bomb.tar.gz", [(tarfile.TarInfo("bomb.webp"), bytes(10_000_000))], "w:gz")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.webp", bytes(10_000_000))
    for bomb in (path, tmp_path / "bomb.zip"):
        assert bomb.stat().st_size < 20_000
        source = {"kind": "archive", "path": str(bomb), "max_unpacked_bytes": 1_000_000}
        with pytest.raises(MobiusError, match="unpacks to more than 1000000 bytes"):
            prepare_data(made.recipe(tmp_path / "out", source))
        assert not [found for found in tmp_path.rglob("*") if found.is_file() and found.suffix not in (".gz", ".zip")]


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_a_bomb_is_refused_with_the_default_limit(tmp_path: Path, ending: str) -> None:
    """By its ratio: clips hardly compress. Nothing of it stays."""
    bomb = tmp_path / f"bomb.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.webp", bytes(archives.BOMB_BYTES + 1))
    else:
        with tarfile.open(bomb, "w:gz", compresslevel=1) as tar:
            member = tarfile.TarInfo("bomb.webp")
            member.size = archives.BOMB_BYTES + 1
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    start = time.process_time()
    with pytest.raises(MobiusError, match=rf"bomb\.{ending} of \d+ bytes unpacks to more than 268435456 bytes"):
        prepare_data(made.recipe(tmp_path / "out", {"kind": "archive", "path": str(bomb)}))
    assert time.process_time() - start < 4
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [bomb]


def test_a_damaged_member_of_a_zip_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "heap.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bad.webp", b"x" * 3000)
        archive.writestr("good.webp", GOOD)
        archive.writestr("good.txt", "words")
    path.write_bytes(path.read_bytes().replace(b"x" * 10, b"y" * 10, 1))
    config = made.recipe(tmp_path / "out", {"kind": "archive", "path": str(path)})
    open_inputs(config, tmp_path / "out" / "work")
    [unpacked] = (tmp_path / "out" / "work").glob("unpacked-*")
    assert unpacked.stat().st_size == len(GOOD) + len("words")
    prepare_data(config)
    assert {row["origin"].partition("!")[2]: row["reason"] for row in made.rows(tmp_path / "out")} == {
        "bad.webp": "damaged",
        "good.webp": None,
    }


@pytest.mark.parametrize("kind", ["list", "metadata", "archive", "webdataset"])
def test_a_pipe_instead_of_a_source_does_not_block(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MobiusError, match=r"pipe: not a regular file|pipe is not a file|1 inputs .*no file"):
        prepare_data(made.recipe(tmp_path / "out", {"kind": kind, "path": str(tmp_path / "pipe")}))


def test_metadata_of_scrapers_is_read(tmp_path: Path) -> None:
    """Invalid UTF-8, lone surrogates, numbers that Python does not read, names that no file has."""
    folder = made.heap(tmp_path / "heap", 3)
    lines = [
        b'{"file_name": "clip000.webp", "text": "caf\xe9", "labels": ["\\ud800"], "group": "\\udfff"}',
        b'{"file_name": "clip001.webp", "text": "\\ud83d dog"}',
        b'{"file_name": "clip002.webp", "text": "dog", "n": ' + b"1" * 5000 + b"}",
        b'{"file_name": "\\ud800.webp", "text": "dog"}',
        b'{"file_name": "a\\u0000.webp", "text": "dog"}',
    ]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    prepare_data(made.recipe(tmp_path / "out", {"kind": "metadata", "path": str(folder / "metadata.jsonl")}))
    rows = made.rows(tmp_path / "out")
    assert [row["reason"] for row in rows] == [None, None, "damaged", "unreadable", "unreadable"]
    assert [row["captions"] for row in rows[:2]] == [{"en": "caf\ufffd"}, {"en": "\ufffd dog"}]
    assert rows[0]["labels"] == ["\ufffd"]
    assert all("invalid UTF-8" in row["notes"][0] for row in rows[:2])


def test_encrypted_and_traversing_members_of_a_zip_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "heap.zip", "w") as archive:
        archive.writestr("good.webp", GOOD)
        archive.writestr("good.txt", "words")
        archive.writestr("../escaped.webp", GOOD)
    prepare_data(made.recipe(tmp_path / "out", {"kind": "archive", "path": str(tmp_path / "heap.zip")}))
    assert {row["origin"].partition("!")[2]: row["reason"] for row in made.rows(tmp_path / "out")} == {
        "good.webp": None,
        "../escaped.webp": "path traversal",
    }


def test_a_shard_with_two_clips_of_a_key_names_both(tmp_path: Path) -> None:
    members = [("a.webp", GOOD), ("a.gif", b"GIF89a"), ("a.txt", b"words"), ("b.left.webp", GOOD), ("b.txt", b"words")]
    path = _tar(tmp_path / "heap.tar", [(tarfile.TarInfo(name), data) for name, data in members])
    prepare_data(made.recipe(tmp_path / "out", {"kind": "webdataset", "path": str(path)}))
    assert {row["origin"].partition("!")[2]: row["reason"] for row in made.rows(tmp_path / "out")} == {
        "a.webp": "duplicate key",
        "a.gif": "duplicate key",
        "b.left.webp": None,
    }


def test_bad_lines_of_metadata_are_named(tmp_path: Path) -> None:
    folder = made.heap(tmp_path / "heap", 2)
    lines = [
        {"file_name": "clip000.webp", "text": "good", "labels": ["x"]},
        {"file_name": "../secret.webp", "text": "out"},
        {"file_name": "absent.webp", "text": "gone"},
        {"text": "no name"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join([*map(json.dumps, lines), "{broken"]) + "\n")
    (tmp_path / "secret.webp").write_bytes(GOOD)
    prepare_data(made.recipe(tmp_path / "out", {"kind": "metadata", "path": str(folder / "metadata.jsonl")}))
    reasons = [row["reason"] for row in made.rows(tmp_path / "out")]
    assert reasons == [None, "path traversal", "unreadable", "missing member", "damaged"]


def test_a_csv_that_breaks_off_and_captions_with_odd_line_ends_are_read(tmp_path: Path) -> None:
    folder = made.heap(tmp_path / "heap", 2)
    (folder / "a.csv").write_text(f"file_name,text\nclip000.webp,good\nclip001.webp,{'x' * 200_000}\n")
    (folder / "b.jsonl").write_text('{"file_name": "clip001.webp", "text": "one\u2028two\u0085three"}\r\n', newline="")
    sources = [{"kind": "metadata", "path": str(folder / name)} for name in ("a.csv", "b.jsonl")]
    prepare_data(made.recipe(tmp_path / "out", *sources))
    assert [row["reason"] for row in made.rows(tmp_path / "out")] == [None, "damaged", None]
    assert made.rows(tmp_path / "out")[2]["captions"] == {"en": "one\u2028two\u0085three"}


def test_a_file_that_cannot_be_read_any_more_is_named(tmp_path: Path) -> None:
    """Gone after the listing, as on a disk that fails."""
    folder = made.heap(tmp_path / "heap", 2)
    config = made.recipe(tmp_path / "out", {"kind": "folder", "path": str(folder)})
    open_inputs(config, tmp_path / "out" / "work")
    (folder / "clip000.webp").unlink()
    prepare_data(config)
    assert [row["reason"] for row in made.rows(tmp_path / "out")] == ["unreadable", None]
    assert "clip000.webp" in (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")


def test_no_clip_left_is_an_error_that_counts_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "heap").mkdir()
    (tmp_path / "heap" / "a.webp").write_bytes(b"no")
    (tmp_path / "heap" / "a.txt").write_text("words")
    with pytest.raises(MobiusError, match=r"1 inputs .*unknown kind \(decode\) 1.*report"):
        prepare_data(made.recipe(tmp_path / "out", {"kind": "folder", "path": str(tmp_path / "heap")}))


def test_missing_captions_have_a_remedy(tmp_path: Path) -> None:
    folder = made.heap(tmp_path / "heap", 2)
    source = {"kind": "folder", "path": str(folder)}
    for path in folder.glob("*.txt"):
        path.rename(tmp_path / path.name)
    sources = ({**source, "captions": "optional"}, source)
    with pytest.raises(MobiusError, match=r"sources\.1\.captions=optional.*remove .*/out") as raised:
        prepare_data(made.recipe(tmp_path / "out", *sources))
    assert "sources.0" not in str(raised.value)
    # The remedy.
    for path in tmp_path.glob("*.txt"):
        path.rename(folder / path.name)
    shutil.rmtree(tmp_path / "out")
    prepare_data(made.recipe(tmp_path / "out", source))
    assert [row["reason"] for row in made.rows(tmp_path / "out")] == [None, None]


@pytest.mark.parametrize("kind", ["folder", "archive", "webdataset"])
def test_a_source_that_is_missing_is_named_with_its_field(kind: str, tmp_path: Path) -> None:
    there = {"kind": "folder", "path": str(made.heap(tmp_path / "heap", 1))}
    missing = {"kind": kind, "path": str(tmp_path / "absent")}
    with pytest.raises(MobiusError, match=r"^sources\.1\.path: there is no .*absent; set sources\.1\.path=PATH"):
        prepare_data(made.recipe(tmp_path / "out", there, missing))
