from __future__ import annotations

import shutil
import subprocess

import pytest
from launching import REPOSITORY

SCRIPTS = [*sorted((REPOSITORY / "slurm").glob("*.sh")), REPOSITORY / ".ci" / "run"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    result = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, SCRIPTS)], cwd=REPOSITORY, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stdout.decode()
