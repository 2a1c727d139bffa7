"""Shards elsewhere: fetched whole, once, or not at all; and no shell unless the user allows one."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import webdataset  # noqa: F401
from clip_files import shard
from launching import launch
from recipes import DS_CONFIGS, Run, losses, recipe, write

from mobius_train.data.remote import Remote, fetch_index, fetch_shard, remote_shards
from mobius_train.data.shards import describe_shard
from mobius_train.errors import MobiusError

# The package has a function of the same name.
openers = sys.modules["webdataset.gopen"]
WORKER = Path(__file__).parents[1] / "runs" / "ranks_worker.py"


class _Handler(SimpleHTTPRequestHandler):
    """Counts what is asked for; /cut/… promises more bytes than it sends."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        data = Path(self.directory, self.path.removeprefix("/cut/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True
        return None

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server:
    """A folder over HTTP."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []
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


def _one(url: str, folder: Path, allow: bool = False) -> Remote:
    (remote,) = remote_shards(url, folder, allow)
    return remote


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# What may be asked for


@pytest.mark.parametrize(
    "source",
    ["pipe:touch {}", " pipe:touch {}", "PIPE:touch {}", "{{pipe:touch {},http://127.0.0.1/a.tar}}"],
)
def test_a_shell_command_is_refused_until_it_is_allowed(tmp_path: Path, source: str) -> None:
    with pytest.raises(MobiusError, match=r"shell command; nothing was run or fetched.*data.allow_shell_commands=true"):
        remote_shards(source.format(tmp_path / "ran"), tmp_path, False)
    assert not (tmp_path / "ran").exists()
    remote_shards(source.format(tmp_path / "ran"), tmp_path, True)


def test_an_address_that_the_environment_makes_a_command_of_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"http://store/=pipe:touch {tmp_path}/ran ")
    with pytest.raises(MobiusError, match="shell command"):
        remote_shards("http://store/a.tar", tmp_path, False)


def test_a_shell_runs_for_pipe_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all openers that webdataset has: what they start, and how."""
    started: dict[str, bool] = {}

    class _Stopped(Exception):
        pass

    def popen(arguments: Any, **options: Any) -> None:
        started[scheme] = bool(options.get("shell")) or isinstance(arguments, str)
        raise _Stopped

    monkeypatch.setattr(openers, "Popen", popen)
    hub = type("Hub", (), {"resolve_path": lambda self, url: type("P", (), dict.fromkeys(HUB_FIELDS, "model"))})
    monkeypatch.setattr("huggingface_hub.HfFileSystem", hub)
    for scheme in openers.gopen_schemes.keys() - {"__default__"}:
        url = f"{scheme}:echo" if scheme == "pipe" else f"{scheme}://host/folder/a.tar"
        with pytest.raises(_Stopped):
            openers.gopen(url)
    assert [scheme for scheme, shell in started.items() if shell] == ["pipe"]
    assert started.keys() == openers.gopen_schemes.keys() - {"__default__"}


HUB_FIELDS = ("repo_id", "path_in_repo", "repo_type", "revision")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("s3://bucket/{0..1}.tar", r"no opener for s3; nothing.*pipe:aws s3 cp s3://bucket/0.tar -"),
        ("file:///a.tar", "mixes paths and addresses"),
        ("{http://host/a.tar,b.tar}", "mixes paths and addresses"),
        ("http://host/*.tar", "cannot be searched, name shards by braces"),
        ("http://host/a[1-9].tar", "cannot be searched"),
        ("{http://host/a.tar,http://host/a.tar}", "more than once"),
        ("http://host/{a.tar", "braces"),
    ],
)
def test_what_cannot_be_opened_is_refused_before_anything_is_asked_for(tmp_path: Path, source: str, match: str) -> None:
    with pytest.raises(MobiusError, match=match):
        remote_shards(source, tmp_path, False)


@pytest.mark.parametrize("name", ["..", ".hidden", "%2e%2e", "a%2fb", "..%2f..%2fa", "a%00b", "", "a" * 300])
def test_no_address_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    path = _one(f"http://host/x/{name}", tmp_path).path
    assert path.resolve().parent.parent == tmp_path.resolve()
    assert path.name.endswith(".tar")


def test_two_addresses_never_share_a_file_nor_show_secrets(tmp_path: Path) -> None:
    urls = ["http://a/x/s.tar", "http://b/x/s.tar", "http://a/y/s.tar", "http://a/x/s.tar?sign=1", "https://a/x/s.tar"]
    assert len({_one(url, tmp_path).path for url in urls}) == 5
    assert str(_one("http://user:word@host/s.tar?sign=1", tmp_path)) == "http://host/s.tar"


# Fetching


@pytest.mark.distributed
def test_a_shard_comes_whole_and_is_compared_with_its_index(server: Server, tmp_path: Path) -> None:
    remote = _one(f"{server.url}/s-0.tar", tmp_path / "to")
    assert "22, the server refused" in str(fetch_index(remote))
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
    with pytest.raises(MobiusError, match=rf"s-2.tar gave {len(data)} bytes of sha256 .* index.json beside it says"):
        fetch_shard(_one(f"{server.url}/s-2.tar", tmp_path / "to"))
    assert _left(tmp_path / "to") == ["index.json", "s-0.tar", "s-1.tar"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("{}/cut/s-0.tar", "ended with 18, the transfer ended before the end"),
        (
            "{}/nothing.tar",
            r"http://127.0.0.1:\d+/nothing.tar cannot be fetched: curl ended with 22, the server",
        ),
        ("{}/page.html", "gave no whole shard"),
        ("http://127.0.0.1:1/s-0.tar", "ended with 7, no connection"),
        ("pipe:cat {folder}/s-0.tar; exit 3", "cannot be fetched: its command ended with 3"),
        ("pipe:head -c 2000 {folder}/s-0.tar", "gave no whole shard"),
        ("pipe:true", "gave no whole shard"),
        ("ais://bucket/s-0.tar", "cannot be fetched: .*No such file.*'ais'"),
    ],
)
def test_what_does_not_come_whole_is_named_and_leaves_nothing(
    server: Server, tmp_path: Path, url: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "page.html").write_text("<html>" + "a" * 2000)
    # With this webdataset closes without a look at the status.
    monkeypatch.setenv("GOPEN_VERBOSE", "1")
    remote = _one(url.format(server.url, folder=server.folder), tmp_path / "to", True)
    with pytest.raises(MobiusError, match=match):
        fetch_shard(remote)
    assert _left(tmp_path / "to") == []


@pytest.mark.distributed
def test_a_place_that_cannot_be_reached_is_not_a_place_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=r"index.json cannot be fetched: curl ended with 7"):
        fetch_index(_one("http://127.0.0.1:1/s-0.tar", tmp_path))


@pytest.mark.distributed
def test_the_control_webdataset_alone_takes_a_command_that_fails_for_one_that_did_not(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_VERBOSE", "1")
    with openers.gopen(f"pipe:head -c 2000 {server.folder}/s-0.tar; exec 1>&-; sleep 0.5; exit 3") as stream:
        while stream.read(100):
            pass


# Whole runs

QUIET: dict[str, Any] = {"validation": {"prompts": []}, "max_train_steps": 2}


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
    commands = f"pipe:cat {server.folder}/s-{{0..2}}.tar"
    piped = run("piped", data=_data(server, tmp_path, train=commands, allow_shell_commands=True), **QUIET)
    assert losses(piped) == expected


@pytest.mark.distributed
def test_a_fetch_that_failed_goes_on_where_it_stopped(run: Run, server: Server, tmp_path: Path) -> None:
    away = (server.folder / "s-1.tar").rename(tmp_path / "away")
    with pytest.raises(MobiusError, match=r"s-1\.tar cannot be fetched"):
        run("first", data=_data(server, tmp_path), **QUIET)
    away.rename(server.folder / "s-1.tar")
    run("second", data=_data(server, tmp_path), **QUIET)
    assert server.asked.count("/s-0.tar") == 1


@pytest.mark.slow
def test_what_is_wrong_with_an_address_is_said_before_models_load(
    run: Run, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobius_train.assembly.build.load_part", None)
    for data, match in (
        (_data(server, tmp_path, train=f"pipe:touch {tmp_path}/ran"), "allow_shell_commands"),
        (_data(server, tmp_path, download_dir=None), "give data.download_dir"),
        (_data(server, tmp_path, validation="s3://bucket/a.tar"), "no opener for s3"),
    ):
        with pytest.raises(MobiusError, match=match):
            run(data=data)
    assert not (tmp_path / "ran").exists()
    assert server.asked == []


@pytest.mark.distributed
def test_ranks_of_a_node_share_the_fetching_and_fail_together(
    server: Server, tiny_pipeline: Path, tmp_path: Path
) -> None:
    server.index()
    values = recipe(tiny_pipeline, server.folder, tmp_path, data=_data(server, tmp_path), validation={"prompts": []})
    values["max_train_steps"] = 1
    path = write(tmp_path / "recipe.yaml", values)
    result = launch(2, WORKER, str(path), str(tmp_path / "runs"), str(DS_CONFIGS), "zero2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(server.asked) == ["/index.json", "/s-0.tar", "/s-1.tar", "/s-2.tar"]
    came = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "to").rglob("*.tar")}
    assert came == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in server.folder.glob("*.tar")}
    (server.folder / "s-2.tar").unlink()
    for left in (tmp_path / "to").rglob("s-2.tar"):
        left.unlink()
    result = launch(2, WORKER, str(path), str(tmp_path / "more"), str(DS_CONFIGS), "zero2")
    assert result.returncode != 0
    assert "s-2.tar cannot be fetched" in result.stderr
