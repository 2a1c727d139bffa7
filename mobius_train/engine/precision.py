"""The compute dtype of the trained module, and the devices that support it."""

from __future__ import annotations

import functools
import logging
import math
import platform

import torch
import torch.distributed as dist
from torch import Tensor

from mobius_train.devices import device_name
from mobius_train.errors import MobiusError

logger = logging.getLogger(__name__)


def _supports(mixed_precision: str, device: torch.device) -> bool:
    if mixed_precision == "no":
        return True
    if mixed_precision == "bf16" and device.type == "cuda":
        # Emulated bf16 has no advantage.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if mixed_precision == "bf16" and device.type == "cpu":
        return True
    # This import takes seconds, and FSDP needs it here alone.
    from deepspeed import get_accelerator

    # Before macOS 14 Apple's GPUs have no bf16.
    return bool(
        get_accelerator().is_fp16_supported() if mixed_precision == "fp16" else get_accelerator().is_bf16_supported()
    )


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Check that the device supports the precision; warn where it would be emulated.

    Raises:
        MobiusError: the device does not support the precision.
    """
    if not _supports(mixed_precision, device):
        others = " or ".join(other for other in ("no", "fp16", "bf16") if _supports(other, device))
        raise MobiusError(
            f"this {device_name(device)} does not support mixed_precision={mixed_precision}: set it to {others}"
        )
    if mixed_precision == "bf16" and device.type == "cpu" and _cpu_emulates_bf16():
        _warn_of_emulation()


def _cpu_emulates_bf16() -> bool:
    """True for x86 CPUs without bfloat16 instructions; False where torch does not report them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return all(check is not None and not check() for check in checks)


@functools.cache
def _warn_of_emulation() -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(
            "mixed_precision=bf16 is emulated on this CPU, which has no bfloat16 instructions: it is up to 40 times"
            " slower than float32, set mixed_precision='no'"
        )


def guarded(loss: Tensor) -> Tensor:
    """Return the loss for the backward pass, whose gradient is NaN if the loss is not finite.

    An infinite loss can have a finite gradient. The factor NaN makes the gradient NaN on every rank after the
    reduction, so all ranks skip the step. The factor one leaves the loss bit-identical.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
