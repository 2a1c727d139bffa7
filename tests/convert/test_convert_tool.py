"""The command line: what a person types, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from launching import REPOSITORY, clean_environment


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(HF_HUB_OFFLINE="1"),
    )


def test_a_conversion_reports_and_one_that_fails_says_why(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    done = convert("from-image-model", stable_diffusion["sd21"], tmp_path / "video", "--mode", "serial")
    assert done.returncode == 0, done.stderr
    assert "checked   the model read back predicts" in done.stdout
    assert "left out  nothing" in done.stdout
    torch.save({"a": 1}, tmp_path / "state.ckpt")
    failed = convert("from-single-file", tmp_path / "state.ckpt", tmp_path / "out", "--config", tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in failed.stderr
