"""What tests go through: kinds of models, those of the quick checks first, and dtypes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

# Of the frozen branch, of the trained one, and autocast: all pairs of two of them.
DTYPES = pytest.mark.parametrize(
    ("frozen", "trained", "autocast"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, True),
    ],
    ids=["fp32-fp32-autocast", "fp32-bf16", "bf16-fp32", "bf16-bf16-autocast"],
)
# The odd size leaves a remainder at each level.
EVEN, ODD = (8, 8), (18, 10)


def quick_first(kinds: Iterable[str], *quick: str) -> list[Any]:
    """The kinds as parameters of a test; `make check` tries the quick ones alone."""
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


# Of the fixture `unet`. Every kind, and each size on two of them; and two kinds that differ the most.
each_kind_in_one_size = pytest.mark.parametrize(
    ("unet", "size"),
    [
        ("emoji", EVEN),
        ("sd2", ODD),
        pytest.param("sd1", ODD, marks=pytest.mark.slow),
        pytest.param("sdxl", EVEN, marks=pytest.mark.slow),
    ],
    indirect=["unet"],
)
two_kinds = pytest.mark.parametrize("unet", quick_first(["emoji", "sdxl"], "emoji"), indirect=True)
