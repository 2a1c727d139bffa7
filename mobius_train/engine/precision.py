"""What the trained module computes in, and where that can be."""

from __future__ import annotations

import math

import deepspeed
import torch
from torch import Tensor

from mobius_train.errors import MobiusError


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """
    Raises:
        MobiusError: the device cannot compute in it.
    """
    accelerator = deepspeed.get_accelerator()
    supported = {"no": True, "fp16": accelerator.is_fp16_supported(), "bf16": True}
    name = "this CPU"
    if device.type == "cuda":
        # torch would emulate it, at no gain.
        supported["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
    if not supported[mixed_precision]:
        others = " or ".join(precision for precision, there in supported.items() if there)
        raise MobiusError(f"mixed_precision={mixed_precision}, which {name} cannot compute in: use {others}")


def guarded(loss: Tensor) -> Tensor:
    """The loss to differentiate, with NaN for a gradient where it is not finite.

    A loss can be infinite and its gradient finite. NaN times a gradient is NaN, which reduction carries to every
    rank, so that all skip the step; one times a loss is the loss to the last bit.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
