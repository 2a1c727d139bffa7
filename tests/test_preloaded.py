"""Scripts in processes of their own: forks, and new Pythons where there is a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest
import torch

pytestmark = pytest.mark.distributed

SCRIPT = """
import os, sys, time
print(sys.argv[1:], os.environ["GIVEN"], flush=True)
print("problem", file=sys.stderr)
time.sleep(float(sys.argv[1]))
raise SystemExit(int(sys.argv[2]))
"""


@pytest.fixture(params=[False, True], ids=["fork", "new Python"])
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_has_its_arguments_variables_output_and_status(script: Path) -> None:
    result = preloaded.run_scripts([[str(script), "0", "3"]], [{"GIVEN": "a"}], timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (3, "['0', '3'] a\n", "problem\n")


def test_one_that_fails_ends_the_others(script: Path) -> None:
    began = time.monotonic()
    commands = [[str(script), "600", "0"], [str(script), "0", "4"]]
    result = preloaded.run_scripts(commands, [{"GIVEN": "a"}, {"GIVEN": "b"}], timeout=300)
    assert result.returncode == 4
    assert time.monotonic() - began < 60


def test_one_that_takes_too_long_is_killed(script: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        preloaded.run_scripts([[str(script), "600", "0"]], [{"GIVEN": "a"}], timeout=2)


def test_popen_is_a_session_of_its_own(script: Path, tmp_path: Path) -> None:
    script.write_text("import os; print(os.getsid(0) == os.getpid())")
    with (tmp_path / "out").open("w") as output:
        process = preloaded.Popen([sys.executable, str(script)], env={}, stdout=output)
        assert process.wait(60) == 0
    assert (tmp_path / "out").read_text() == "True\n"
