"""The record of the study and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import emoji_study
import pytest

REPOSITORY = Path(__file__).parents[2]


def test_the_page_has_the_table_of_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / "emoji_study.json").read_text())
    emoji_study._print(record["results"])
    table = capsys.readouterr().out
    assert "| serial, 0 |" in table
    assert table in (REPOSITORY / "docs" / "quality.md").read_text()
