"""Files and folders that appear whole, and the header of safetensors files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobius_train import files
from mobius_train.errors import MobiusError
from mobius_train.safetensors_header import DTYPE_NAMES, lay_out

OLD = Path(__file__).parent / "files" / "written-by-0.1.0"


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _of_process(path: Path, process: int) -> Path:
    return path.with_name(files.temporary_of(path).name.replace(f"-{os.getpid()}-", f"-{process}-"))


def _of_own_number(path: Path) -> Path:
    """What a process of a restarted container left, which had this process's number."""
    return path.with_name(files.temporary_of(path).name.replace(files._TOKEN, "0" * 8))


@pytest.fixture(scope="module")
def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_files_get_their_names_together_and_after_an_error_none_does(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ZeroDivisionError), files.finished_files(paths) as temporaries:
        _ = [temporary.write_text("1") for temporary in temporaries] and 1 / 0
    # The second was never written.
    with pytest.raises(FileNotFoundError), files.finished_files(paths) as (first, _):
        first.write_text("1")
    assert _names(tmp_path) == []
    with files.finished_files(paths) as temporaries:
        assert len({*temporaries, *paths}) == 4
        for temporary in temporaries:
            temporary.write_text(temporary.name)
        assert not any(path.exists() for path in paths)
    assert _names(tmp_path) == ["a", "b"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[tuple[str, bool]] = []
    sync = files.sync

    def seen(path: Path) -> None:
        states.append((path.name, (tmp_path / "a").exists()))
        sync(path)

    monkeypatch.setattr(files, "sync", seen)
    files.replace_file(tmp_path / "a", "text")
    (temporary, before), *rest = states
    assert temporary.startswith(files.TEMPORARY)
    assert (before, rest) == (False, [(tmp_path.name, True)])


@pytest.mark.distributed
def test_only_what_ended_processes_of_this_node_left_is_removed(tmp_path: Path, ended: int) -> None:
    _of_process(tmp_path / "file", ended).touch()
    (_of_process(tmp_path / "folder", ended) / "inside").mkdir(parents=True)
    kept = [_of_process(tmp_path / "x", os.getppid()), files.temporary_of(tmp_path / "x"), tmp_path / ".tmp-far-1-x"]
    for path in (*kept, tmp_path / "x"):
        path.touch()
    files.remove_killed(tmp_path)
    assert _names(tmp_path) == sorted(path.name for path in (*kept, tmp_path / "x"))
    files.remove_leftovers(tmp_path)
    assert _names(tmp_path) == ["x"]


@pytest.mark.distributed
def test_a_folder_replaces_another_only_when_it_is_finished(tmp_path: Path, ended: int) -> None:
    folder = tmp_path / "out"
    for left in (_of_process(folder, ended), _of_own_number(folder)):
        left.mkdir()
        (left / "left").touch()
    with files.finished_folder(folder) as temporary:
        (temporary / "first").touch()
    with pytest.raises(MobiusError, match="overwrite"), files.finished_folder(folder):
        pass
    with pytest.raises(ZeroDivisionError), files.finished_folder(folder, overwrite=True):
        raise ZeroDivisionError
    assert _names(folder) == ["first"]
    with files.finished_folder(folder, overwrite=True) as temporary:
        (temporary / "second").touch()
    assert _names(tmp_path) == ["out", "out/second"]


@pytest.mark.distributed
def test_no_two_temporary_names_are_equal_and_a_foreign_one_stays_until_it_is_old(tmp_path: Path, ended: int) -> None:
    names = {files.temporary_of(tmp_path / "x").name for _ in range(4)}
    assert len(names) == 4
    # Another container of the same name: its processes cannot be looked up here.
    foreign = _of_process(tmp_path / "x", ended)
    foreign = foreign.with_name(foreign.name.replace(files.process_place(), "0" * 8))
    foreign.touch()
    files.remove_killed(tmp_path)
    assert foreign.exists()
    os.utime(foreign, (0, 0))
    files.remove_killed(tmp_path)
    assert not foreign.exists()


def test_a_replaced_folder_has_its_name_at_every_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for swaps in (True, False):
        for name in ("new", "out"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / name).touch()
        if not swaps:
            monkeypatch.setattr(files, "_swap", lambda first, second: False)
        else:
            assert files._swap(tmp_path / "new", tmp_path / "out")
            assert _names(tmp_path / "out") == ["new"]
            assert files._swap(tmp_path / "new", tmp_path / "out")
        files.publish_folder(tmp_path / "new", tmp_path / "out", replace=True)
        assert _names(tmp_path) == ["out", "out/new"]
        (tmp_path / "out" / "new").unlink()


def test_a_link_in_place_of_a_written_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.link(tmp_path / "target", tmp_path / "hard link")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "hard link", "pipe"):
        files.write_file(tmp_path / name, [b"other"])
        assert (tmp_path / name).read_text() == "other"
    assert (tmp_path / "target").read_text() == "kept"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        files.sha256(path)
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "link").symlink_to("b")
    assert files.sha256(tmp_path / "link").startswith("e3b0c442")


def test_of_two_that_publish_a_folder_the_first_has_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files.publish_folder(tmp_path / "one", tmp_path / "out")
    with pytest.raises(OSError, match="not empty"):
        files.publish_folder(tmp_path / "two", tmp_path / "out")
    assert _names(tmp_path / "out") == ["one"]


def test_a_header_is_byte_for_byte_that_of_version_0_1_0() -> None:
    path = OLD / "parallel" / "checkpoint-2" / "rank-00000-of-00001.safetensors"
    data = path.read_bytes()
    records = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = records.pop("__metadata__")
    tensors = {name: (torch.float32, record["shape"]) for name, record in records.items()}
    layout = lay_out(tensors, metadata, compact=False)
    assert data.startswith(layout.header)
    assert layout.size == len(data)


def test_the_library_reads_every_dtype_at_its_place(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPE_NAMES}
    layout = lay_out({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, {"format": "pt"})
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for name, tensor in tensors.items():
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        data[layout.places[name] : layout.places[name] + len(content)] = content
    (tmp_path / "a.safetensors").write_bytes(data)
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_published_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with files.finished_folder(tmp_path / "folder") as folder:
        (folder / "part").mkdir()
        save_file({"a": torch.ones(1)}, folder / "part" / "file.safetensors")
    files.publish(tmp_path / "file.safetensors", lambda path: save_file({"a": torch.ones(1)}, path))
    for path in (tmp_path / "folder" / "part" / "file.safetensors", tmp_path / "file.safetensors"):
        assert path.stat().st_mode == plain.stat().st_mode
