"""Choosing some of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


def evenly(values: Sequence[Value], most: int) -> list[Value]:
    """At most `most` of the values, spread evenly, in their order. The first is always among them."""
    count = min(most, len(values))
    return [values[number * len(values) // count] for number in range(count)]
