"""Lists of clips (JSON, CSV, Parquet), and the layouts of Hugging Face's folders of images and videos."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clip_files import animation, numbers
from opened_data import opened

from mobius_train.data.clips import ClipDataset, describe_source, open_clips
from mobius_train.data.metadata import metadata_records
from mobius_train.errors import MobiusError
from mobius_train.prepare.sources.local_files import Metadata

RECORDS: list[dict[str, Any]] = [
    {"file_name": "b.webp", "text": "bee, flying"},
    {"file_name": "sub/a.webp", "text": "甲"},
]
CAPTIONS = {"b": ["bee, flying"], "sub/a": ["甲"]}


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def commas(path: Path, records: list[dict[str, Any]]) -> None:
    rows = [",".join(records[0]), *(",".join(f'"{value}"' for value in record.values()) for record in records)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def whole(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def parquet(path: Path, records: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(records), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".jsonl": lines,
    ".csv": commas,
    ".json": whole,
    ".parquet": parquet,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.webp and sub/a.webp, and c.webp that no list names."""
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    for name in ("b", "sub/a", "c"):
        (folder / f"{name}.webp").write_bytes(animation(4))
    return folder


def read(source: Path) -> ClipDataset:
    return open_clips(str(source), num_frames=4, resolution=16)


def captions(clips: ClipDataset) -> dict[str, list[str]]:
    return {key: clips.captions(index) for index, key in enumerate(clips.keys)}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_list_is_a_source_of_training_and_of_preparation(
    folder: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / f"best{suffix}"
    WRITERS[suffix](path, RECORDS)
    clips = read(path)
    assert captions(clips) == CAPTIONS
    assert numbers(clips[1].frames) == [0, 1, 2, 3]
    assert describe_source(str(path)).startswith("1 files")
    references = Metadata(kind="metadata", path=path).references(folder)
    assert [(reference.key, reference.caption, reference.problem) for reference in references] == [
        ("b", "bee, flying", None),
        ("sub_a", "甲", None),
    ]
    # The same file in the layout of a folder.
    path.rename(folder / f"metadata{suffix}")
    assert captions(read(folder)) == CAPTIONS
    assert "1 clips that metadata" in caplog.text


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_a_list_lacks_is_named_with_its_place(folder: Path, suffix: str) -> None:
    def refused(records: list[dict[str, Any]], match: str) -> None:
        WRITERS[suffix](folder / f"bad{suffix}", records)
        with pytest.raises(MobiusError, match=rf"bad\{suffix}.*{match}"):
            read(folder / f"bad{suffix}")

    place = {".jsonl": "line 2", ".csv": "line 3", ".json": "record 2", ".parquet": "row 2"}[suffix]
    refused([RECORDS[0], {"file_name": "../x.webp", "text": "x"}], f"{place}.*outside")
    refused([RECORDS[0], {"file_name": "none.webp", "text": "x"}], f"{place}.*none")
    refused([{"name": "b.webp", "text": "x"}], "file_name.*name, text")
    refused([{"file_name": "b.webp", "words": "x"}], "caption")


@pytest.mark.parametrize(
    ("suffix", "text", "match"),
    [
        (".json", "{", "not valid JSON"),
        (".json", "[" * 100_000, "not valid JSON"),
        (".json", '"dog"', "neither"),
        (".json", "[]", "empty"),
        (".json", '["b.webp"]', "file_name"),
        (".csv", "", "empty"),
        (".parquet", "PAR1 it is not", "Parquet"),
    ],
)
def test_a_damaged_list_is_named(folder: Path, suffix: str, text: str, match: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
    (folder / f"bad{suffix}").write_text(text)
    with pytest.raises(MobiusError, match=rf"(?s)bad\{suffix}.*{match}"):
        read(folder / f"bad{suffix}")


def test_a_json_can_map_files_to_captions(folder: Path) -> None:
    (folder / "map.json").write_text(json.dumps({"b.webp": "bee", "sub/a.webp": {"caption": ["ay", "甲"]}}))
    assert captions(read(folder / "map.json")) == {"b": ["bee"], "sub/a": ["ay", "甲"]}


@pytest.mark.parametrize("field", ["file_name", "video_file_name", "image_file_name", "video", "path"])
@pytest.mark.parametrize("words", ["caption", "text", "prompt"])
def test_fields_have_the_names_that_data_sets_give_them(folder: Path, field: str, words: str) -> None:
    lines(folder / "l.jsonl", [{field: "b.webp", words: "bee", "fps": 8}])
    assert captions(read(folder / "l.jsonl")) == {"b": ["bee"]}


def test_a_parquet_without_pyarrow_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    (folder / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MobiusError, match=r"a\.parquet.*pip install 'mobius-train\[parquet\]'"):
        list(metadata_records(folder / "a.parquet"))


# Layouts of folders


def test_each_subfolder_can_have_its_own_list(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """train/metadata.csv and test/metadata.jsonl, as in the folders of `datasets`."""
    lines(folder / "sub" / "metadata.jsonl", [{"file_name": "a.webp", "text": "ay"}])
    with pytest.raises(MobiusError, match=r"2 of 3 clips .*b\.txt"):
        read(folder)
    (folder / "b.txt").write_text("bee")
    (folder / "c.txt").write_text("sea")
    assert captions(read(folder)) == {"b": ["bee"], "c": ["sea"], "sub/a": ["ay"]}
    assert "left out" not in caplog.text
    # However the folder is named.
    assert captions(read(folder / "sub" / "..")) == captions(read(folder))
    lines(folder / "sub" / "metadata.jsonl", [{"file_name": "a.webp", "text": "ay"}] * 2)
    with pytest.raises(MobiusError, match=r"1 keys occur more than once.*sub/a\b"):
        read(folder)
    lines(folder / "sub" / "metadata.jsonl", [{"file_name": "a.webp", "text": "ay"}])
    # A caption of the clip's own name wins, as before there were lists of subfolders.
    (folder / "sub" / "a.txt").write_text("own")
    assert captions(read(folder))["sub/a"] == ["own"]
    commas(folder / "sub" / "metadata.csv", RECORDS)
    assert captions(read(folder))["sub/a"] == ["own"]
    (folder / "sub" / "a.txt").unlink()
    with pytest.raises(MobiusError, match=r"sub has both metadata\.jsonl and metadata\.csv"):
        read(folder)


def test_a_list_of_another_program_does_not_replace_captions(folder: Path) -> None:
    for name in ("b", "c", "sub/a"):
        (folder / f"{name}.txt").write_text(name)
    (folder / "metadata.json").write_text('{"version": 3}')
    assert captions(read(folder)) == {"b": ["b"], "c": ["c"], "sub/a": ["sub/a"]}


def test_class_folders_give_captions_where_there_are_none(folder: Path) -> None:
    (folder / "sub").rename(folder / "running_dog")
    (folder / "b.txt").write_text("bee")
    with pytest.raises(MobiusError, match=r"2 of 3 clips .*folder_captions"):
        opened(folder, train=str(folder))
    clips = opened(folder, train=[{"path": str(folder), "folder_captions": True, "caption_prefix": "sks"}])
    assert captions(clips) == {"b": ["sks bee"], "c": ["sks clips"], "running_dog/a": ["sks running dog"]}
    lines(folder / "l.jsonl", RECORDS[:1])
    with pytest.raises(MobiusError, match=r"folder_captions.*l\.jsonl"):
        opened(folder, train=[{"path": str(folder / "l.jsonl"), "folder_captions": True}])
