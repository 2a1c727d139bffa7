"""The floating point types of a run's models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mobius_train.config import RunConfig

# As recipes name them; `no` is mixed_precision's word for float32.
DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Dtypes:
    """What each model of a run computes in.

    Attributes:
        trained: the trained module; its master weights are float32 all the same.
        frozen: the frozen branch beside the trained module.
        text: the frozen text encoders, whose results are float32 all the same.
    """

    trained: torch.dtype
    frozen: torch.dtype
    text: torch.dtype

    @classmethod
    def of(cls, config: RunConfig) -> Dtypes:
        frozen = config.frozen_dtype or config.mixed_precision
        return cls(DTYPES[config.mixed_precision], DTYPES[frozen], DTYPES[config.text_encoder_dtype])
