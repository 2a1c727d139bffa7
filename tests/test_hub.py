"""Pushing to the hub: the real client against a server on this machine that answers as the hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from recipes import REPOSITORY

from mobius_train.config import load
from mobius_train.errors import MobiusError
from mobius_train.hub import check_login, check_model, make_repository, push_folder
from mobius_train.run import check_reports


class Hub:
    """A hub with one user, who is logged in with the token `hf_me`.

    Attributes:
        requests: method, path and JSON of each request.
        pushed: the files of each commit, by path.
        refuses: paths that contain it are answered with 403.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.pushed: list[dict[str, bytes]] = []
        self.refuses = "nothing"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        # What the client asks for itself, once.
        if path == "/api/agent-harnesses":
            return 404, {"error": "not found"}
        self.requests.append((method, path, lines[0] if len(lines) == 1 else lines))
        if token != "Bearer hf_me":
            return 401, {"error": "Invalid credentials"}
        if self.refuses in path:
            return 403, {"error": "You don't have the rights"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/validate-yaml":  # of a model card
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            owner = lines[0].get("organization") or "me"
            return 200, {"url": f"{self.address}/{owner}/{lines[0]['name']}"}
        if path.endswith("/auth-check/write"):
            return 200, {}
        if path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/commit/main"):
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.pushed.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            return 200, {"commitUrl": f"{self.address}/{name}/commit/abc", "commitOid": "abc", "success": True}
        return 404, {"error": "not found"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply("GET")

            def do_POST(self) -> None:
                self._reply("POST")

            def _reply(self, method: str) -> None:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                status, values = answer(method, path, self.headers.get("Authorization"), body)
                content = json.dumps(values).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    # The client reads the variables of these once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    yield made
    made.server.shutdown()
    made.server.server_close()


def final(folder: Path) -> Path:
    """A folder like final/ of a run."""
    for name in ("model_index.json", "README.md", "samples.gif", "unet/config.json"):
        path = folder / "my-run" / "final" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    return folder / "my-run" / "final"


def test_the_whole_folder_is_pushed_to_a_private_repository(server: Hub, tmp_path: Path) -> None:
    folder = final(tmp_path)
    check_login("me/motion")
    name = make_repository("me/motion", private=True)
    assert name == "me/motion"
    assert push_folder(folder, name) == f"{server.address}/me/motion/commit/abc"
    [pushed] = server.pushed
    assert pushed == {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert server.requests[0][:2] == ("GET", "/api/whoami-v2")
    # One of the user's own, and public.
    assert make_repository("motion", private=False) == "me/motion"
    made = [values for _, path, values in server.requests if path == "/api/repos/create"]
    assert [(one["organization"], one["name"]) for one in made] == [("me", "motion"), (None, "motion")]
    assert [one["visibility"] for one in made] == ["private", "public"]


def test_what_cannot_be_pushed_is_named(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MobiusError, match="has no model in diffusers' layout"):
        check_model(tmp_path)
    check_model(final(tmp_path))
    server.refuses = "/commit/"
    with pytest.raises(MobiusError, match=r"final was not pushed to me/motion: .*403.*hf auth login"):
        push_folder(final(tmp_path), "me/motion")
    assert server.pushed == []
    # It cannot be made; and it exists, but is another's.
    for server.refuses in ("/repos/create", "/auth-check"):
        with pytest.raises(MobiusError, match="cannot make the repository other/motion"):
            make_repository("other/motion", private=True)
    with pytest.raises(MobiusError, match="cannot push to a/b/c"):
        check_login("a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(MobiusError, match="cannot push to me/motion"):
        check_login("me/motion")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MobiusError, match="HF_HUB_OFFLINE=0"):
        check_login("me/motion")


def test_a_recipe_is_checked_before_anything_is_loaded(server: Hub) -> None:
    recipe = REPOSITORY / "configs" / "emoji.yaml"
    check_reports(load(recipe))
    assert server.requests == []
    check_reports(load(recipe, ["hub_model_id=me/motion"]))
    # Nothing is made: a dry run checks the same.
    assert [path for _, path, _ in server.requests] == ["/api/whoami-v2"]


@pytest.mark.slow
def test_a_run_pushes_its_final_folder_and_keeps_it_if_that_fails(
    run: Any, server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(max_train_steps=1, hub_model_id="me/motion")
    files = {str(path.relative_to(folder / "final")) for path in (folder / "final").rglob("*") if path.is_file()}
    # The client makes several commits of large files.
    assert sorted(path for pushed in server.pushed for path in pushed) == sorted(files)
    assert "README.md" in files
    assert "pushed to " in capsys.readouterr().out
    server.refuses = "/commit/"
    with pytest.raises(MobiusError, match=r"python tools/push_to_hub.py .*again/final --repository me/motion"):
        run("again", max_train_steps=1, hub_model_id="me/motion")
    assert (folder.parent / "again" / "final" / "model_index.json").is_file()
    assert (folder.parent / "again" / "checkpoint-1").is_dir()
