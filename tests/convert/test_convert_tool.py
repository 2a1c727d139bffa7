"""The command line: what a person types, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import convert

pytestmark = pytest.mark.distributed


def test_a_conversion_reports_and_one_that_fails_says_why(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    done = convert("from-image-model", stable_diffusion["small"], tmp_path / "video", "--mode", "serial")
    assert done.returncode == 0, done.stderr
    assert "checked   the model read back predicts" in done.stdout
    assert "left out  nothing" in done.stdout
    assert done.stderr == ""
    torch.save({"a": 1}, tmp_path / "state.ckpt")
    failed = convert("from-single-file", tmp_path / "state.ckpt", tmp_path / "out", "--config", tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in failed.stderr
