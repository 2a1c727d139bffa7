"""A picture of a plan that cannot be written is an error before the planning."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from mobius_train.errors import MobiusError
from mobius_train.plan.picture import check_picture


def test_a_missing_matplotlib_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MobiusError, match=r"matplotlib.*mobius-train\[plot\]"):
        check_picture(tmp_path / "plan.png")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_kind_or_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    check_picture(tmp_path / "plan.png")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "plan.doc", tmp_path / "file" / "plan.png"):
        with pytest.raises(MobiusError, match=str(path)):
            check_picture(path)
