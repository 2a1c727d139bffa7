"""The kinds of models that tests go through: those of the quick checks, and the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick_first(kinds: Iterable[str], *quick: str) -> list[Any]:
    """The kinds as parameters of a test; `make check` tries the quick ones alone."""
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]
