from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from clip_files import animation, numbers, pictures, shard, video, write_tar
from torch.utils.data import DataLoader

from mobius_train.data import clips as clips_module
from mobius_train.data import verified
from mobius_train.data.clips import Clip, ClipDataset, fingerprint, open_clips
from mobius_train.data.entry import Entry
from mobius_train.data.kinds import CLIP_SUFFIXES, ENDINGS, VIDEO_ENDINGS
from mobius_train.data.shards import describe_shard, read_shards, verify_shards
from mobius_train.errors import MobiusError
from mobius_train.files import sha256
from mobius_train.job.distributed import Distributed

EMOJI = Path(__file__).parents[2] / "assets" / "fluent-emoji" / "64"


def opened(source: Path | str, **options: str) -> ClipDataset:
    return open_clips(str(source), num_frames=4, resolution=16, **options)


def whole(batch: list[Clip]) -> list[Clip]:
    return batch


def refused(source: Path | str, match: str, **options: str) -> None:
    with pytest.raises(MobiusError, match=match):
        opened(source, **options)


def write_index(folder: Path) -> None:
    shards = {path.name: describe_shard(path)._asdict() for path in folder.glob("*.tar")}
    (folder / "index.json").write_text(json.dumps({"shards": shards}))


# Sources


def test_shards_by_path_glob_and_braces(tmp_path: Path) -> None:
    for number, keys in enumerate((["a", "b"], ["c"], ["d"])):
        shard(tmp_path / f"s-{number}.tar", keys)
    assert opened(tmp_path / "s-0.tar").keys == ["a", "b"]
    assert opened(tmp_path / "s-*.tar").keys == ["a", "b", "c", "d"]
    clips = opened(tmp_path / "s-{0..2}.tar")
    assert clips.keys == ["a", "b", "c", "d"]
    assert clips[2].caption == "the c"
    assert numbers(clips[2].frames) == [0, 1, 2, 3]
    assert numbers(clips[2].frame(3).frames) == [3]
    assert opened(tmp_path / "s-0.tar", caption_language="zh")[0].caption == "这是 a"
    refused(tmp_path / "s-{0..3}.tar", r"s-3\.tar.*s-\{0\.\.3\}\.tar")
    refused(tmp_path / "s-{0..3.tar", "braces")
    refused(tmp_path / "t-*.tar", r"t-\*\.tar")


@pytest.mark.parametrize(
    "source",
    [
        "pipe:touch {}",
        " pipe:touch {}",
        "{{pipe:touch {},b}}",
        "http://localhost/a.tar",
        "file:{}",
        "s3://b/{{0..1}}.tar",
    ],
)
def test_commands_and_addresses_are_refused_and_nothing_runs(tmp_path: Path, source: str) -> None:
    refused(source.format(tmp_path / "ran"), "nothing was run or fetched")
    assert not (tmp_path / "ran").exists()


@pytest.mark.distributed
def test_every_clip_once_over_workers_and_after_pickling(tmp_path: Path) -> None:
    keys = [f"clip{number}" for number in range(12)]
    shard(tmp_path / "a.tar", keys[:7])
    shard(tmp_path / "b.tar", keys[7:])
    clips = opened(tmp_path / "*.tar")
    clips[0]
    for context in ("fork", "spawn"):
        loader = DataLoader(clips, batch_size=5, num_workers=2, multiprocessing_context=context, collate_fn=whole)
        read = [clip for batch in loader for clip in batch]
        assert [clip.key for clip in read] == keys
        assert all(numbers(clip.frames) == [0, 1, 2, 3] for clip in read)
    assert pickle.loads(pickle.dumps(clips))[11].key == "clip11"


def test_the_identity_is_of_contents_not_of_places(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / f"{name}.tar", ["a", "b"])
    one = opened(tmp_path / "one" / "*.tar")
    assert one.identity == opened(tmp_path / "two" / "*.tar").identity
    others = [
        opened(tmp_path / "one" / "*.tar", caption_language="zh"),
        open_clips(str(tmp_path / "one" / "*.tar"), num_frames=2, resolution=16),
        open_clips(str(tmp_path / "one" / "*.tar"), num_frames=4, resolution=8),
        opened(shard(tmp_path / "three.tar", ["a", "b"], frames=5)),
        opened(shard(tmp_path / "four.tar", ["a", "c"])),
    ]
    assert len({tuple(dataset.identity.values()) for dataset in (one, *others)}) == 6


def test_the_identity_is_of_every_byte_of_clips_that_are_not_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips_module, "HASHED_ENDS", 16)
    path = tmp_path / "a.webp"
    path.write_bytes(bytes(1000))
    entries = [Entry("a", (), path, 0, 1000, ".webp", "a.webp")]
    before = fingerprint(entries)
    path.write_bytes(bytes(500) + b"x" + bytes(499))
    assert fingerprint(entries) != before
    # The control: of more data the ends are read.
    monkeypatch.setattr(clips_module, "HASHED_WHOLE", 999)
    middle = fingerprint(entries)
    path.write_bytes(bytes(1000))
    assert fingerprint(entries) == middle
    path.write_bytes(bytes(999) + b"x")
    assert fingerprint(entries) != middle


# Shards


def test_every_truncation_is_detected(tmp_path: Path) -> None:
    """Wherever it is cut, up to the end of the two blocks that close a tar, an error names the file."""
    data = shard(tmp_path / "whole.tar", ["a", "b"]).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar) + 1024
    cut, silent = tmp_path / "cut.tar", 0
    positions = sorted(
        {*range(0, end, 37), *(p for b in range(0, end, 512) for p in (b - 1, b, b + 1) if 0 <= p < end)}
    )
    for position in positions:
        cut.write_bytes(data[:position])
        with pytest.raises(MobiusError, match=r"cut\.tar"):
            read_shards([cut], "en")
        # The negative control: tarfile alone takes many of these for whole archives.
        try:
            with tarfile.open(cut) as tar:
                tar.getmembers()
            silent += 1
        except tarfile.TarError:
            pass
    assert silent > 0
    # Behind them only padding is lost: all clips are there, and the index tells of it still.
    cut.write_bytes(data[:end])
    assert len(read_shards([cut], "en")) == 2
    (tmp_path / "index.json").write_text(
        json.dumps({"shards": {"cut.tar": describe_shard(tmp_path / "whole.tar")._asdict()}})
    )
    refused(cut, r"cut\.tar.*\d+ bytes.*index\.json")


def test_a_broken_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", ["a", "b"])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmember("b.json").offset
    data[header + 150] ^= 0xFF
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["a.json", "a.webp"]
    refused(path, r"a\.tar")


def test_incomplete_and_repeated_samples_are_refused(tmp_path: Path) -> None:
    clip = animation(4)
    refused(write_tar(tmp_path / "a.tar", {"k.webp": clip}), r"\bk\b.*caption.*\.webp")
    refused(write_tar(tmp_path / "b.tar", {"k.txt": b"dog", "k.pyd": b"x"}), r"\bk\b.*\.pyd \.txt")
    both = {"k.webp": clip, "k.gif": animation(4, "GIF"), "k.txt": b"dog"}
    refused(write_tar(tmp_path / "c.tar", both), r"c\.tar")
    refused(write_tar(tmp_path / "d.tar", {}), r"\b1 shard")
    shard(tmp_path / "e-0.tar", ["k", "l"])
    shard(tmp_path / "e-1.tar", ["m", "l"])
    refused(tmp_path / "e-*.tar", r"e-0\.tar/l\.webp, .*e-1\.tar/l\.webp")
    with tarfile.open(tmp_path / "f.tar", "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("k.webp")
            member.size = len(clip)
            tar.addfile(member, io.BytesIO(clip))
    refused(tmp_path / "f.tar", r"f\.tar.*k\.webp")
    with tarfile.open(tmp_path / "g.tar", "w") as tar:
        link = tarfile.TarInfo("k.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    refused(tmp_path / "g.tar", r"g\.tar.*k\.webp")
    with tarfile.open(tmp_path / "h.tar", "w:gz"):
        pass
    refused(tmp_path / "h.tar", r"h\.tar.*\.gz")


def test_captions_of_shards(tmp_path: Path) -> None:
    clip = animation(4)
    for number, (suffix, caption) in enumerate(
        [("txt", b" a dog\n"), ("json", b'{"caption": "a dog"}'), ("json", b'{"text": "a dog"}')]
    ):
        path = write_tar(tmp_path / f"{number}.tar", {"k.webp": clip, f"k.{suffix}": caption})
        assert opened(path)[0].caption == "a dog"
    refused(shard(tmp_path / "a.tar", ["k"]), r"a\.tar/k\b.*'fr'.*en, zh", caption_language="fr")
    for number, bad in enumerate((b"{", b"[]", b"{}", b'{"text": ""}', b'{"text": 3}', b"\xff")):
        refused(write_tar(tmp_path / f"b{number}.tar", {"k.webp": clip, "k.json": bad}), "caption")


def test_the_index_is_compared(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", ["k", "l"])
    write_index(tmp_path)
    assert len(opened(path)) == 2
    assert verify_shards(tmp_path) == 1
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # inside the first caption
    path.write_bytes(data)
    with pytest.raises(MobiusError, match=r"a\.tar.*index\.json"):
        verify_shards(tmp_path)
    path.write_bytes(data[:-512])
    refused(path, r"a\.tar.*\d+ bytes.*index\.json.*\d+")
    path.unlink()
    with pytest.raises(MobiusError, match=r"a\.tar"):
        verify_shards(tmp_path)
    (tmp_path / "index.json").write_text('{"shards": {"a.t')
    with pytest.raises(MobiusError, match=r"index\.json"):
        verify_shards(tmp_path)


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"shards": {"b.tar": {}}}'])
def test_an_index_without_the_shard_is_reported(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = shard(tmp_path / "a.tar", ["k", "l"])
    write_index(tmp_path)
    assert len(opened(path)) == 2
    assert not caplog.records
    (tmp_path / "index.json").write_text(content)
    assert len(opened(path)) == 2
    assert "not verified; the first is" in caplog.text
    assert str(path) in caplog.text


def test_an_archive_that_ends_before_its_file_is_refused(tmp_path: Path) -> None:
    """`tarfile` takes zeros for the end of an archive, and ignores what follows."""
    path = shard(tmp_path / "a.tar", ["k", "l", "m"])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        header = tar.getmember("l.json").offset
    zeroed = whole[:header] + bytes(1024) + whole[header + 1024 :]
    for damaged in (zeroed, whole + shard(tmp_path / "b.tar", ["n"]).read_bytes(), whole + b"x"):
        path.write_bytes(damaged)
        with tarfile.open(path) as tar:
            assert set(tar.getnames()) <= {"k.json", "k.webp", "l.json", "l.webp", "m.json", "m.webp"}
        refused(path, r"a\.tar, after [13] samples: it ends at byte \d+, but other data follow")
    path.write_bytes(whole)
    assert len(opened(path)) == 3


def test_an_archive_whose_end_was_lost_to_zeros_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shard(tmp_path / "a.tar", ["k", *(f"l{number}" for number in range(10, 25))])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        lost = len(whole) - tar.getmember("l10.json").offset
    path.write_bytes(whole[:-lost] + bytes(lost))
    assert len(opened(path)) == 1
    assert f"a.tar has 2 members and then {lost} bytes of zeros" in caplog.text
    # The control: a record's padding is usual.
    caplog.clear()
    assert len(opened(shard(tmp_path / "b.tar", ["n"]))) == 1
    assert "zeros" not in caplog.text


def test_a_flipped_bit_is_found_when_shards_are_opened(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", [name, f"{name}2"])
    write_index(tmp_path)
    assert len(opened(tmp_path / "*.tar")) == 4
    data = bytearray((tmp_path / "b.tar").read_bytes())
    with tarfile.open(tmp_path / "b.tar") as tar:
        data[tar.getmember("b.webp").offset_data + 60] ^= 1
    (tmp_path / "b.tar").write_bytes(data)
    refused(tmp_path / "*.tar", r"1 of 2 shards differ from their sha256 in index\.json; the first is .*b\.tar")
    (tmp_path / "index.json").unlink()
    assert len(opened(tmp_path / "*.tar")) == 4  # the control: nothing else tells


def test_large_shards_are_hashed_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(verified, "sha256", counted)
    monkeypatch.setattr(verified, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(verified, "RECORDED_BYTES", 1)
    path = shard(tmp_path / "a.tar", ["k", "l"])
    write_index(tmp_path)
    for _ in range(3):
        assert len(opened(path)) == 2
    assert hashed == ["a.tar"]
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # inside the first caption
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    refused(path, r"a\.tar")
    assert hashed == ["a.tar", "a.tar"]
    # Without a place for the record, every start verifies.
    monkeypatch.setattr(verified, "CACHE", path / "cache")
    refused(path, r"a\.tar")
    verified.remember_verified(path, "0")


def test_members_without_a_sample_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"k.webp": animation(4), "k.txt": b"dog", "README": b"x", ".hidden.webp": animation(4)}
    assert opened(write_tar(tmp_path / "a.tar", members)).keys == ["k"]
    assert "2 members of shards belong to no sample and are left out; the first is" in caplog.text
    assert "a.tar/README" in caplog.text


# Folders


def test_a_folder_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name, data in {
        "a.gif": animation(4, "GIF"),
        "b.webp": animation(4),
        "c.MP4": video(4),
        "more/d.webm": video(4, ".webm"),
        "more/e.mov": video(4, ".mov"),
    }.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text(f"clip {name}")
    clips = opened(tmp_path)
    assert clips.keys == ["a", "b", "c", "more/d", "more/e"]
    assert clips[3].caption == "clip more/d.webm"
    assert all(numbers(clips[number].frames) == [0, 1, 2, 3] for number in range(5))
    (tmp_path / "b.txt").unlink()
    refused(tmp_path, r"\b1 of 5\b.*b\.txt.*b\.webp")


def test_every_suffix_of_preparation_is_trained_on(tmp_path: Path) -> None:
    for number, suffix in enumerate(CLIP_SUFFIXES):
        kind = next(kind for kind, suffixes in ENDINGS.items() if suffix in suffixes)
        if kind in VIDEO_ENDINGS:
            data = video(4, {"mov": ".mp4", "matroska": ".webm", "avi": ".avi"}[kind])
        elif kind == "jpeg":
            buffer = io.BytesIO()
            pictures(1)[0].save(buffer, "JPEG")
            data = buffer.getvalue()
        else:
            data = animation(4, kind.upper())
        (tmp_path / f"{number:02d}{suffix.upper()}").write_bytes(data)
        (tmp_path / f"{number:02d}.TXT").write_text("a dog")
    clips = open_clips(str(tmp_path), num_frames=1, resolution=16)
    assert len(clips) == len(CLIP_SUFFIXES)
    assert {clips[number].caption for number in range(len(clips))} == {"a dog"}


def test_linked_folders_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As on clusters, where clips lie in a store. Links may lead back."""
    data, store = tmp_path / "data", tmp_path / "store"
    for folder, names in ((data, ["a"]), (store, ["b", "c"]), (store / "deep", ["d"])):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.webp").write_bytes(animation(4))
            (folder / f"{name}.txt").write_text(name)
    (data / "linked").symlink_to(store)
    assert opened(data).keys == ["a", "linked/b", "linked/c", "linked/deep/d"]
    assert not caplog.text
    (data / "again").symlink_to(store / "deep")
    (store / "back").symlink_to(data)
    (store / "deep" / "loop").symlink_to(store / "deep")
    keys = opened(data).keys
    assert sorted(Path(key).name for key in keys) == ["a", "b", "c", "d"]
    assert "linked folders that were already read" in caplog.text
    (data / "metadata.jsonl").write_text('{"file_name": "linked/b.webp", "text": "bee"}\n')
    assert opened(data).keys == ["linked/b"]
    assert re.search(r"\d clips that metadata\.jsonl does not list", caplog.text)


def test_what_is_left_out_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.webp").write_bytes(animation(4))
    for name in ("a.txt", "alone.txt", "note.docx", "b.docx", "LICENSE", ".a.webp"):
        (tmp_path / name).write_text("x")
    (tmp_path / "gone.webp").symlink_to(tmp_path / "nowhere")
    assert opened(tmp_path).keys == ["a"]
    for part in (
        "2 .docx files (b.docx, …)",
        "1 files without suffix (LICENSE)",
        "1 captions without a clip (alone.txt)",
        "1 hidden files (.a.webp)",
        "1 broken links, pipes and devices (gone.webp)",
    ):
        assert part in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    opened(tmp_path)
    assert not caplog.text


def test_metadata_names_the_clips(tmp_path: Path) -> None:
    for name in ("a", "b", "unlisted"):
        (tmp_path / f"{name}.webp").write_bytes(animation(4))
    lines = tmp_path / "metadata.jsonl"
    lines.write_text(
        '{"file_name": "b.webp", "text": "bee"}\n\n{"file_name": "a.webp", "caption": {"en": "ay", "zh": "甲"}}\n',
        encoding="utf-8",
    )
    assert [(clip.key, clip.caption) for clip in map(opened(tmp_path).__getitem__, range(2))] == [
        ("a", "ay"),
        ("b", "bee"),
    ]
    assert opened(tmp_path, caption_language="zh")[0].caption == "甲"
    refused(tmp_path, "line 3 .*'fr'.*en, zh", caption_language="fr")
    for line, match in {
        '{"file_name": "../a.webp", "text": "x"}': r"\.\./a\.webp",
        '{"file_name": "/etc/a.webp", "text": "x"}': "/etc/a.webp",
        '{"file_name": "c.webp", "text": "x"}': r"c\.webp",
        '{"file_name": "a.pyd", "text": "x"}': r"a\.pyd",
        '{"file_name": "a.webp"}': "line 1 .*caption",
        '{"text": "x"}': "line 1 .*file_name",
        "{": "line 1 .*JSON",
        "": r"metadata\.jsonl",
    }.items():
        lines.write_text(line)
        refused(tmp_path, match)
    lines.unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\na.webp,"a dog, running"\n')
    assert opened(tmp_path)[0].caption == "a dog, running"
    (tmp_path / "metadata.csv").write_text("name,text\na.webp,dog\n")
    refused(tmp_path, "line 2 .*file_name")
    lines.write_text("{}")
    refused(tmp_path, r"metadata\.csv")


def test_an_empty_folder_says_what_it_holds(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path.name)
    (tmp_path / "a.txt").write_text("x")
    shard(tmp_path / "a.tar", ["k"])
    refused(tmp_path, r"\b1 \.tar\b.*\*\.tar")


def test_clips_of_one_name_are_clips_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in preparation. A file that is listed twice is an error."""
    (tmp_path / "a.gif").write_bytes(animation(4, "GIF"))
    (tmp_path / "a.webp").write_bytes(animation(4))
    (tmp_path / "a.txt").write_text("x")
    assert opened(tmp_path).keys == ["a-gif", "a-webp"]
    assert "2 clips share a name and a caption" in caplog.text
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.gif", "text": "x"}\n' * 2)
    refused(tmp_path, r"\ba\b.*a\.gif, .*a\.gif")


def test_a_short_clip_is_named_when_it_is_read(tmp_path: Path) -> None:
    clips = opened(shard(tmp_path / "a.tar", ["k"], frames=3))
    with pytest.raises(MobiusError, match=r"a\.tar/k\.webp.*\b3\b.*\b4\b"):
        clips[0]


# What is committed


def test_the_committed_shards_are_whole() -> None:
    assert verify_shards(EMOJI) == 5
    counts = json.loads((EMOJI / "index.json").read_text(encoding="utf-8"))["counts"]
    for split in ("train", "heldout"):
        for language in ("en", "zh"):
            clips = open_clips(f"{EMOJI}/{split}-*.tar", num_frames=8, resolution=64, caption_language=language)
            assert len(clips) == counts[split]
            assert clips[len(clips) - 1].frames.shape == (8, 3, 64, 64)


def test_ranks_divide_the_reading_of_shards(tmp_path: Path) -> None:
    paths = [
        write_tar(tmp_path / f"{number}.tar", {f"{number}{i}.gif": b"GIF89a", f"{number}{i}.txt": b"t", "x": b""})
        for number, i in enumerate("abc")
    ]
    read: list[tuple[int, int]] = []

    def divide(act: Callable[[int, int], Any]) -> list[Any]:
        read.extend((share, 2) for share in range(2))
        return [act(share, 2) for share in range(2)]

    ranks = cast(Distributed, SimpleNamespace(divide=divide))
    assert read_shards(paths, "en", ranks) == read_shards(paths, "en")
    assert len(read) == 2
    assert list(read_shards(paths, "en").keys) == ["0a", "1b", "2c"]


def test_an_error_of_one_rank_ends_a_divided_work_on_all() -> None:
    def rank(number: int, outcomes: Callable[[Any], list[Any]]) -> Distributed:
        return cast(Distributed, SimpleNamespace(rank=number, world_size=2, gather_objects=outcomes))

    assert Distributed.divide(rank(1, lambda own: ["of 0", own]), lambda share, shares: (share, shares)) == [
        "of 0",
        (1, 2),
    ]
    sound = rank(1, lambda own: [MobiusError("of rank 0"), own])
    with pytest.raises(MobiusError, match="of rank 0"):
        Distributed.divide(sound, lambda share, shares: share)

    def fail(share: int, shares: int) -> None:
        raise MobiusError("of rank 1")

    # The failing rank takes part in the exchange, so the others do not wait for it.
    with pytest.raises(MobiusError, match="of rank 1"):
        Distributed.divide(rank(1, lambda own: [0, own]), fail)


def test_an_empty_folder_and_one_of_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match="is empty"):
        open_clips(str(tmp_path), num_frames=1, resolution=16)
    (tmp_path / "a.doc").touch()
    with pytest.raises(MobiusError, match=r"1 \.doc"):
        open_clips(str(tmp_path), num_frames=1, resolution=16)
