"""A rank with data workers, which ignore SIGTERM, ends however its work ends, and says why."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import clean_environment

WORKER = Path(__file__).parent / "leaving_worker.py"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("refuse", 1, "error: of the input"),
        ("raise", 1, "RuntimeError: of a step"),
        ("kill a worker", 1, "is killed by signal"),
        ("interrupt", 130, "interrupted"),
        ("exit", 3, ""),
        ("return", 0, ""),
    ],
)
def test_it_ends_with_its_workers(how: str, code: int, text: str) -> None:
    result = subprocess.run(
        [sys.executable, str(WORKER), how], env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == code, result.stderr
    assert text in result.stderr
    workers = [Path(f"/proc/{pid}") for pid in result.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
