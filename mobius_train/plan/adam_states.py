"""What an implementation of AdamW keeps and makes, in bytes."""

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
        eight_bit: codes of one byte, and a float32 for each block of them.
        copies: temporaries as large as all that a rank steps.
    """

    eight_bit: bool = False
    copies: int = 0

    def moments(self, elements: int) -> int:
        """Bytes of both moments of one tensor that is stepped."""
        if not self.eight_bit or elements < SMALLEST_8BIT:
            return 2 * rounded(elements * FP32)
        return 2 * (rounded(elements) + rounded(math.ceil(elements / BLOCK) * FP32))


# torch's, which this project takes on GPUs; and its default elsewhere, which takes the square roots of all second
# moments at once.
FUSED, FOREACH = Adam(), Adam(copies=1)
EIGHT_BIT = Adam(eight_bit=True)
