"""Choose the attention kernel from the machine's hardware, the installed packages and measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.utils.import_utils import is_flash_attn_available, is_flash_attn_version

from mobius_train.errors import MobiusError
from mobius_train.models.attention import AttentionBackend

# Requirements of the flash-attn package; diffusers supports it from this version.
FLASH_VERSION = "2.6.3"
FLASH_CAPABILITY = (8, 0)
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIM = 256


@dataclass(frozen=True)
class Machine:
    """The machine's properties that determine the choice.

    Attributes:
        capability: the GPU's compute capability; None without a GPU.
        flash_attn: the flash-attn package is installed.
    """

    capability: tuple[int, int] | None
    flash_attn: bool

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls(capability, is_flash_attn_available() and is_flash_attn_version(">=", FLASH_VERSION))


@dataclass(frozen=True)
class Choice:
    """A backend, and the reason for it."""

    backend: AttentionBackend
    reason: str


def choose_attention(
    requested: AttentionBackend | Literal["auto"], machine: Machine, dtype: torch.dtype, head_dim: int, temporal: bool
) -> Choice:
    """Choose the backend of the temporal attention layers (`temporal`), or of all other attention layers.

    Args:
        head_dim: size of the largest head.

    Raises:
        MobiusError: flash_attn is requested and cannot run; the message gives the reason.
    """
    obstacle = _flash_obstacle(machine, dtype, head_dim)
    if requested == "flash_attn" and obstacle:
        raise MobiusError(
            f"attention_backend=flash_attn cannot run: {obstacle}. Use attention_backend=auto, which chooses a"
            " backend that can run"
        )
    if requested != "auto":
        return Choice(requested, "set in the recipe")
    if obstacle is None:
        return Choice("flash_attn", "flash-attn is installed and supports the GPU and dtype")
    if temporal and machine.capability is None and dtype in FLASH_DTYPES:
        # benchmarks/temporal_attention_cpu.json
        return Choice("eager", f"the fastest measured for short sequences in {_name(dtype)} on a CPU")
    return Choice("sdpa", f"no flash-attn: {obstacle}")


def _flash_obstacle(machine: Machine, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why flash-attn cannot run; None if it can."""
    if machine.capability is None:
        return "it needs a CUDA GPU"
    if machine.capability < FLASH_CAPABILITY:
        has = ".".join(map(str, machine.capability))
        return f"it needs compute capability 8.0 (A100, RTX 30 or newer), this GPU has {has}"
    if dtype not in FLASH_DTYPES:
        return f"it supports fp16 and bf16, not {_name(dtype)}"
    if head_dim > FLASH_HEAD_DIM:
        return f"it supports heads of at most {FLASH_HEAD_DIM} channels, these have {head_dim}"
    if not machine.flash_attn:
        return f"the package is not installed (pip install 'mobius-train[flash]': flash-attn {FLASH_VERSION} or newer)"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
