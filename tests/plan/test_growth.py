"""The benchmark of growth: its rows and tables."""

from __future__ import annotations

import json
from typing import Any

import growth
import pytest


def test_a_list_of_clips_is_measured() -> None:
    found = growth.list_of_clips(3000)
    assert 3000 * 100 < found["sent"] < 3000 * 200
    assert set(found) == {"index", "sent", "order", "buckets", "seconds"}


def test_powers_tell_linear_from_quadratic_growth() -> None:
    small, large = {"n": 2, "a": 6, "b": 10}, {"n": 8, "a": 24, "b": 160}
    assert growth.exponent(small, large, "a", "n") == pytest.approx(1)
    assert growth.exponent(small, large, "b", "n") == pytest.approx(2)


def test_the_record_is_what_the_page_shows() -> None:
    record: dict[str, Any] = json.loads((growth.REPOSITORY / "benchmarks" / "growth.json").read_text(encoding="utf-8"))
    page = growth.PAGE.read_text(encoding="utf-8")
    assert growth.renewed(page, "\n".join(growth.tables(record)), growth.MARKS) == page
    assert not any("seconds" in row for row in record["clips"])
