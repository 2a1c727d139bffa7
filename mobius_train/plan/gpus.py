"""Memory and precision support of common GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mobius_train.config import RunConfig
from mobius_train.errors import MobiusError


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        gib: memory available to a process, including its CUDA context, in GiB.
        bf16: has bfloat16 matrix units (compute capability 8.0 and newer).
        flash_attn: FlashAttention-2 has kernels for it (compute capability 8.0 and newer).
    """

    name: str
    gib: float
    bf16: bool = True
    flash_attn: bool = True

    @property
    def bytes(self) -> int:
        return int(self.gib * 2**30)

    @property
    def half_precision(self) -> Literal["bf16", "fp16"]:
        """The `mixed_precision` to choose on it."""
        return "bf16" if self.bf16 else "fp16"


# Total capacity as reported by torch's out-of-memory errors on these cards under Linux, which is below the nominal
# size. Those without a report (RTX-4060-Ti, RTX-4070, RTX-4080, A10, A6000, MI300X) are the nominal size less the share
# that cards of the same memory and generation lack.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # Volta and Turing: compute capability 7.0 and 7.5.
        Gpu("V100-16", 15.77, bf16=False, flash_attn=False),
        Gpu("V100-32", 31.74, bf16=False, flash_attn=False),
        Gpu("T4-16", 14.7, bf16=False, flash_attn=False),
        Gpu("RTX-2080-Ti-11", 10.73, bf16=False, flash_attn=False),
        # Ampere: 8.0 and 8.6.
        Gpu("A100-40", 39.39),
        Gpu("A100-80", 79.15),
        Gpu("A10-24", 21.9),
        Gpu("A6000-48", 47.4),
        Gpu("RTX-3060-12", 11.75),
        Gpu("RTX-3080-10", 9.78),
        Gpu("RTX-3090-24", 23.6),
        # Ada and Hopper: 8.9 and 9.0.
        Gpu("L4-24", 21.95),
        Gpu("L40S-48", 44.4),
        Gpu("RTX-4060-Ti-16", 15.6),
        Gpu("RTX-4070-12", 11.6),
        Gpu("RTX-4080-16", 15.6),
        Gpu("RTX-4090-24", 23.6),
        Gpu("H100-80", 79.1),
        Gpu("H200-141", 139.7),
        # Blackwell: 12.0 and 10.0.
        Gpu("RTX-5090-32", 31.36),
        Gpu("B200-180", 178.3),
        # CDNA 3, under ROCm.
        Gpu("MI300X-192", 191.5),
    )
}


def find_gpu(name: str) -> Gpu:
    """Find a GPU of the table by name, or make one from a size in GiB.

    Raises:
        MobiusError: the name is neither in the table nor a size.
    """
    for known, gpu in GPUS.items():
        if name.lower() == known.lower():
            return gpu
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b)?", name.strip(), re.IGNORECASE)
    if size is not None and float(size[1]) > 0:
        return Gpu(f"GPU of {size[1]} GiB", float(size[1]))
    raise MobiusError(f"unknown GPU {name!r}: give one of {', '.join(GPUS)}, or a size in GiB such as 24")


def check_gpu(gpu: Gpu, config: RunConfig) -> None:
    """Check that the GPU supports the recipe's dtypes and attention backend.

    Raises:
        MobiusError: it does not support one of them.
    """
    if config.mixed_precision == "bf16" and not gpu.bf16:
        raise MobiusError(
            f"mixed_precision=bf16 on a {gpu.name}: it has no bfloat16 units; set mixed_precision=fp16, which uses"
            " loss scaling"
        )
    if config.text_encoder_dtype == "bf16" and not gpu.bf16:
        raise MobiusError(f"text_encoder_dtype=bf16 on a {gpu.name}: it has no bfloat16 units; set it to fp32")
    if config.frozen_dtype == "bf16" and not gpu.bf16:
        raise MobiusError(f"frozen_dtype=bf16 on a {gpu.name}: it has no bfloat16 units; set frozen_dtype=fp16")
    if config.attention_backend == "flash_attn" and not gpu.flash_attn:
        raise MobiusError(
            f"attention_backend=flash_attn on a {gpu.name}: FlashAttention-2 has no kernels for it; set sdpa"
        )
    if config.attention_backend == "flash_attn" and config.mixed_precision == "no":
        raise MobiusError("attention_backend=flash_attn in float32: its kernels support only bf16 and fp16; set sdpa")
