"""The hooks of conftest.py: `make check` starts no process, so a test without the mark must not."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_without_the_mark_fails(method: str) -> None:
    process = multiprocessing.get_context(method).Process(target=print)  # type: ignore[attr-defined]
    with pytest.raises(pytest.fail.Exception, match="mark it as distributed"):
        process.start()


def test_a_program_without_the_mark_fails_even_where_errors_are_caught() -> None:
    def start() -> None:
        try:
            subprocess.run([sys.executable, "-c", ""], check=True)
        except Exception:
            return

    with pytest.raises(pytest.fail.Exception, match=os.path.basename(sys.executable)):
        start()


def test_a_short_question_to_the_machine_is_no_process_of_a_test() -> None:
    assert subprocess.run(["git", "--version"], check=True, capture_output=True).stdout


@pytest.mark.distributed
def test_the_control_with_the_mark_it_runs() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_a_whole_run_without_the_mark_fails(request: pytest.FixtureRequest) -> None:
    with pytest.raises(pytest.fail.Exception, match="mark the test as slow"):
        request.getfixturevalue("run")
