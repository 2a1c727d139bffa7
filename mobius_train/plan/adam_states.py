"""Bytes of the moments of AdamW implementations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mobius_train.engine.adam_state import BLOCK
from mobius_train.plan.trace import rounded

FP32 = 4
# bitsandbytes keeps the moments of smaller tensors in float32 (optim/optimizer.py, min_8bit_size).
SMALLEST_8BIT = 4096


@dataclass(frozen=True)
class Adam:
    """An implementation of AdamW.

    Attributes:
        eight_bit: moments are one-byte codes, with a float32 scale for each block.
    """

    eight_bit: bool = False

    def moments(self, elements: int) -> int:
        """Bytes of both moments of a tensor with so many elements."""
        if not self.eight_bit or elements < SMALLEST_8BIT:
            return 2 * rounded(elements * FP32)
        return 2 * (rounded(elements) + rounded(math.ceil(elements / BLOCK) * FP32))


FLOAT32 = Adam()
EIGHT_BIT = Adam(eight_bit=True)
