"""Shards elsewhere: fetched complete, once, or not at all; no shell, and no secret in an error."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from clip_files import shard
from fsspec.registry import _registry
from launching import launch
from recipes import Run, losses, recipe, write

from mobius_train.data import remote as module
from mobius_train.data.remote import ATTEMPTS, Remote, fetch_index, fetch_shard, remote_shards
from mobius_train.data.shards import describe_shard
from mobius_train.errors import MobiusError

WORKER = Path(__file__).parent / "fetch_worker.py"


class _Handler(SimpleHTTPRequestHandler):
    """Counts requests. The first folder of the path says what goes wrong: always, or with -once at the first time."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        fault, _, name = self.path.partition("?")[0][1:].rpartition("/")
        if fault.endswith("-once") and self.asked.count(self.path) > 1:
            fault = ""
        match fault.removesuffix("-once"):
            case "cut" | "drop" | "stall" as how:
                data = Path(self.directory, name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                if how == "stall":
                    threading.Event().wait(2)
                if how == "drop":  # closed by a reset
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
            case "busy":
                self.send_error(503)
            case "endless" | "drip" as how:  # without a length
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):
                    for _ in range(2**14 if how == "endless" else 100):
                        self.wfile.write(bytes(2**16) if how == "endless" else b"x")
                        time.sleep(0 if how == "endless" else 0.05)
            case "forbidden":
                self.send_error(403)
            case _:
                self.path = f"/{name}"
                super().do_GET()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server:
    """A folder over HTTP."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        handler = type("Handler", (_Handler,), {"asked": self.asked})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def index(self) -> None:
        shards = {path.name: describe_shard(path)._asdict() for path in sorted(self.folder.glob("*.tar"))}
        (self.folder / "index.json").write_text(json.dumps({"shards": shards}))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(3):
        shard(folder / f"s-{number}.tar", [f"clip{number}{letter}" for letter in "abcd"])
    served = Server(folder)
    thread = threading.Thread(target=served.http.serve_forever, daemon=True)
    thread.start()
    yield served
    served.http.shutdown()
    served.http.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, without the waiting."""
    pauses: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    return pauses


def _one(url: str, folder: Path) -> Remote:
    (remote,) = remote_shards(url, folder)
    return remote


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# What may be asked for


@pytest.mark.parametrize(
    "source",
    ["pipe:touch {}", " pipe:touch {}", "PIPE:touch {}", "pipe:curl http://a >{}", "{{pipe:touch {},http://a/a.tar}}"],
)
def test_a_shell_command_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(MobiusError, match=r"^pipe: .*nothing was run or fetched.*fsspec"):
        remote_shards(source.format(tmp_path / "ran"), tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("ais://bucket/{0..1}.tar", r"ais://bucket/0.tar: fsspec .*ais://"),
        ("file:/a.tar", "file:/a.tar.*no scheme://"),
        ("{http://host/a.tar,b.tar}", "b.tar.*no scheme://"),
        ("http://host/*.tar", r"\{000000..000003\}"),
        ("http://host/a[1-9].tar", r"\{000000..000003\}"),
        ("simplecache::http://host/a.tar", "chained"),
        ("{http://host/a.tar,http://host/a.tar}", "http://host/a.tar .*more than once"),
        ("http://user:word@host/{a.tar?sign=1", r"braces .*'http://host/\{a.tar'"),
    ],
)
def test_an_address_that_cannot_be_opened_is_refused_before_any_request(
    tmp_path: Path, source: str, match: str
) -> None:
    with pytest.raises(MobiusError, match=match):
        remote_shards(source, tmp_path)


@pytest.mark.parametrize(
    ("scheme", "needs", "match"),
    [
        ("s3", "s3fs", "s3fs"),
        ("gs", "gcsfs", "gcsfs"),
        ("hf", "huggingface_hub", "huggingface_hub"),
        ("https", "fsspec.implementations.http", r"mobius-train\[remote\]"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, needs: str, match: str
) -> None:
    monkeypatch.delitem(_registry, scheme, raising=False)
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(MobiusError, match=f"^{scheme}://place/a.tar: .*missing.*{match}"):
        remote_shards(f"{scheme}://place/a.tar", tmp_path)


@pytest.mark.parametrize("name", ["..", ".hidden", "%2e%2e", "a%2fb", "..%2f..%2fa", "a%00b", "", "a" * 300])
def test_no_address_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    path = _one(f"http://host/x/{name}", tmp_path).path
    assert path.resolve().parent.parent == tmp_path.resolve()
    assert path.name.endswith(".tar")


def test_two_addresses_never_share_a_file(tmp_path: Path) -> None:
    urls = ["http://a/x/s.tar", "http://b/x/s.tar", "http://a/y/s.tar", "http://a/x/s.tar?sign=1", "https://a/x/s.tar"]
    assert len({_one(url, tmp_path).path for url in urls}) == 5


def test_a_shard_lies_where_version_0_1_0_put_it(tmp_path: Path) -> None:
    assert _one("https://host/set/s.tar", tmp_path).path == tmp_path / "https-host-2e9722dcad65b76d" / "s.tar"


# Fetching


@pytest.mark.distributed
def test_a_shard_comes_whole_and_is_compared_with_its_index(server: Server, tmp_path: Path) -> None:
    remote = _one(f"{server.url}/s-0.tar", tmp_path / "to")
    assert "/index.json" in str(fetch_index(remote))
    fetch_shard(remote)
    assert remote.path.read_bytes() == (server.folder / "s-0.tar").read_bytes()
    server.index()
    assert fetch_index(remote) is None
    other = _one(f"{server.url}/s-1.tar", tmp_path / "to")
    count: list[int] = []
    fetch_shard(other, count.append)
    assert sum(count) == other.path.stat().st_size
    # Whole, of the right size, and something else.
    path = server.folder / "s-2.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(MobiusError, match=rf"s-2.tar has {len(data)} bytes .*sha256 .* index.json"):
        fetch_shard(_one(f"{server.url}/s-2.tar", tmp_path / "to"))
    assert _left(tmp_path / "to") == ["index.json", "s-0.tar", "s-1.tar"]


@pytest.mark.parametrize("fault", ["cut", "drop", "stall", "busy"])
def test_a_fault_that_passes_costs_a_retry(
    server: Server, tmp_path: Path, fault: str, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE", 0.5)
    count: list[int] = []
    remote = _one(f"{server.url}/{fault}-once/s-0.tar", tmp_path / "to")
    fetch_shard(remote, count.append)
    assert remote.path.read_bytes() == (server.folder / "s-0.tar").read_bytes()
    assert sum(count) == remote.path.stat().st_size
    assert len(server.asked) == 2
    assert pauses == [1]


@pytest.mark.parametrize(
    ("path", "requests", "match"),
    [
        ("cut/s-0.tar", ATTEMPTS, "s-0.tar: .*payload.* 5 of 5"),
        ("drop/s-0.tar", ATTEMPTS, "s-0.tar: .* 5 of 5"),
        ("busy/s-0.tar", ATTEMPTS, "s-0.tar: .*503.* 5 of 5"),
        ("forbidden/s-0.tar", 1, "s-0.tar: .*403"),
        ("nothing.tar", 1, "nothing.tar: there is no such file"),
        ("page.html", 1, "page.html .*shard"),
    ],
)
def test_an_incomplete_shard_is_named_and_leaves_nothing(
    server: Server, tmp_path: Path, path: str, requests: int, match: str, pauses: list[float]
) -> None:
    (server.folder / "page.html").write_text("<html>" + "a" * 2000)
    count: list[int] = []
    with pytest.raises(MobiusError, match=f"{server.url}/.*{match}"):
        fetch_shard(_one(f"{server.url}/{path}", tmp_path / "to"), count.append)
    assert len(server.asked) == requests
    assert pauses == [1, 2, 4, 8][: requests - 1]
    assert _left(tmp_path / "to") == []


def test_an_endless_file_is_left_at_the_size_that_it_can_have(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak: list[int] = []
    free = shutil.disk_usage(tmp_path).free
    remote = _one(f"{server.url}/endless/s-0.tar", tmp_path / "to")
    monkeypatch.setattr(module, "MAX_INDEX_BYTES", 2**20)
    with pytest.raises(MobiusError, match=r"endless/index\.json: .*more than 1048576 bytes \(attempt 1"):
        fetch_index(remote)
    # Of unknown size: the disk keeps its reserve.
    monkeypatch.setattr(module, "RESERVE", free - 2**25)
    with pytest.raises(MobiusError, match=r"endless/s-0\.tar: .*more than \d+ bytes \(attempt 1"):
        fetch_shard(remote, peak.append)
    server.index()
    shutil.copy(server.folder / "index.json", remote.path.with_name("index.json"))
    size = (server.folder / "s-0.tar").stat().st_size
    with pytest.raises(MobiusError, match=rf"endless/s-0\.tar: .*more than {size} bytes \(attempt 1"):
        fetch_shard(remote, peak.append)
    assert sum(peak) == 0
    assert max(peak) < 2**26
    assert _left(tmp_path / "to") == ["index.json"]


def test_a_server_that_sends_a_byte_now_and_then_is_silent(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE", 0.5)
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    with pytest.raises(MobiusError, match=r"less than 1024 bytes per second arrived in \d+ s \(attempt 2 of 2"):
        fetch_shard(_one(f"{server.url}/drip/s-0.tar", tmp_path / "to"))
    assert _left(tmp_path / "to") == []


def test_a_server_out_of_reach_is_not_one_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=r"cannot fetch .*index.json: .*127.0.0.1.* 5 of 5"):
        fetch_index(_one("http://127.0.0.1:1/s-0.tar", tmp_path))


@pytest.mark.parametrize("place", ["{}/nothing.tar", "{}/cut/s-0.tar", "{}/busy/s-0.tar", "http://127.0.0.1:1/s-0.tar"])
def test_no_error_shows_a_secret(server: Server, tmp_path: Path, place: str) -> None:
    url = place.format(server.url).replace("http://", "http://user:pass-word@") + "?X-Signature=abc%2Fdef"
    remote = _one(url, tmp_path)
    assert remote.index_file is None
    with pytest.raises(MobiusError) as caught:
        fetch_shard(remote)
    for text in (str(remote), str(fetch_index(remote)), *traceback.format_exception(caught.value)):
        assert not any(secret in text for secret in ("pass-word", "abc%2Fdef", "abc/def")), text
    assert all("X-Signature=abc%2Fdef" in asked for asked in server.asked)  # sent, and to the letter


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_schemes_of_fsspec(server: Server, tmp_path: Path, scheme: str) -> None:
    server.index()
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(server.folder), "/served", recursive=True)
    folder = f"memory:///{server.folder.name}" if scheme == "memory" else server.folder.as_uri()
    shards = remote_shards(f"{folder}/s-{{0..2}}.tar", tmp_path / "to")
    assert fetch_index(shards[0]) is None
    for remote in shards:
        fetch_shard(remote)
        assert remote.path.read_bytes() == (server.folder / remote.path.name).read_bytes()
    assert server.asked == []
    with pytest.raises(MobiusError, match="there is no such file"):
        fetch_shard(_one(f"{folder}/absent.tar", tmp_path / "to"))


@pytest.mark.distributed
def test_processes_that_fetch_the_same_shard_do_not_collide(server: Server, tmp_path: Path) -> None:
    server.index()
    remote = _one(f"{server.url}/cut-once/s-0.tar", tmp_path / "to")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch_shard, args=(remote,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert _left(tmp_path / "to") == ["s-0.tar"]


def test_a_folder_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "to").write_text("a file")
    with pytest.raises(MobiusError, match=rf"cannot write .*index.json to {tmp_path}/to/"):
        fetch_index(_one(f"{server.url}/s-0.tar", tmp_path / "to"))
    assert server.asked == []


def test_a_full_disk_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    def get_file(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "url_to_fs", lambda url, **_: (SimpleNamespace(get_file=get_file), url))
    with pytest.raises(MobiusError, match=r"cannot fetch .*s.tar: .*No space.* 1 of 5"):
        fetch_shard(_one("memory://folder/s.tar", tmp_path))
    assert pauses == []


# Whole runs

QUIET: dict[str, Any] = {"validation": {"prompts": [], "max_clips": 1}, "max_train_steps": 1}


def _data(server: Server, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "train": f"{server.url}/s-{{0..2}}.tar",
        "validation": f"{server.url}/s-0.tar",
        "resolution": 16,
        "download_dir": str(tmp_path / "to"),
        **changes,
    }


@pytest.mark.distributed
def test_a_run_on_fetched_shards_is_that_on_local_ones(
    run: Run, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.index()
    local = {"train": f"{server.folder}/s-*.tar", "validation": f"{server.folder}/s-0.tar", "resolution": 16}
    expected = losses(run("local", data=local, **QUIET))
    assert losses(run("fetched", data=_data(server, tmp_path), **QUIET)) == expected
    assert "fetching train, shard 3 of 3" in capfd.readouterr().err
    # Each once, and then never again.
    assert sorted(server.asked) == ["/index.json", "/s-0.tar", "/s-1.tar", "/s-2.tar"]
    assert losses(run("again", data=_data(server, tmp_path), **QUIET)) == expected
    assert len(server.asked) == 4


@pytest.mark.distributed
def test_a_fetch_that_failed_goes_on_where_it_stopped(run: Run, server: Server, tmp_path: Path) -> None:
    away = (server.folder / "s-1.tar").rename(tmp_path / "away")
    with pytest.raises(MobiusError, match=r"cannot fetch .*s-1\.tar"):
        run("first", data=_data(server, tmp_path), **QUIET)
    away.rename(server.folder / "s-1.tar")
    run("second", data=_data(server, tmp_path), **QUIET)
    assert server.asked.count("/s-0.tar") == 1


@pytest.mark.slow
def test_what_is_wrong_with_an_address_is_said_before_models_load(
    run: Run, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobius_train.tasks.build_task.load_parts", None)
    for data, match in (
        (_data(server, tmp_path, train=f"pipe:touch {tmp_path}/ran"), "^pipe: "),
        (_data(server, tmp_path, download_dir=None), "data.download_dir=FOLDER"),
        (_data(server, tmp_path, validation="ais://bucket/a.tar"), "ais://"),
    ):
        with pytest.raises(MobiusError, match=match):
            run(data=data)
    assert not (tmp_path / "ran").exists()
    assert server.asked == []


@pytest.mark.distributed
def test_ranks_of_a_node_share_the_fetching_and_fail_together(server: Server, tmp_path: Path) -> None:
    server.index()
    path = write(tmp_path / "recipe.yaml", recipe(tmp_path, server.folder, tmp_path, data=_data(server, tmp_path)))
    result = launch(2, WORKER, str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(result.stdout.splitlines()) == [f"rank {rank}: 12 and 4 clips" for rank in (0, 1)]
    assert sorted(server.asked) == ["/index.json", "/s-0.tar", "/s-1.tar", "/s-2.tar"]
    came = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "to").rglob("*.tar")}
    assert came == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in server.folder.glob("*.tar")}
    (server.folder / "s-2.tar").unlink()
    for left in (tmp_path / "to").rglob("s-2.tar"):
        left.unlink()
    result = launch(2, WORKER, str(path))
    assert result.returncode == 1
    # The first to end terminates the other, which may not come to its message.
    assert re.search(r"error: .*cannot fetch .*s-2\.tar", result.stderr)
