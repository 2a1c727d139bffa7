"""The device that a process computes on: a CUDA GPU, the GPU of an Apple computer (MPS), or the CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mobius_train.errors import MobiusError


def best_device() -> torch.device:
    """The first CUDA GPU, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def collective_device(device: torch.device) -> torch.device:
    """Where the tensors of a collective must be: on the device, but no library exchanges tensors of Apple's GPU."""
    return torch.device("cpu") if device.type == "mps" else device


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device. The host does not wait for a CUDA GPU, which copies from pinned memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype)
    return tensor.to(dtype=dtype).pin_memory().to(device, non_blocking=True)


def host_copy(module: nn.Module) -> nn.Module:
    """A copy of a frozen module in host memory, without a second copy on its device."""
    tensors: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False) for p in module.parameters()
    }
    tensors |= {id(b): b.detach().to("cpu", copy=True) for b in module.buffers()}
    return copy.deepcopy(module, tensors)


class Arriving:
    """A scalar on its way from a device to the host, which waits for it at `value`."""

    def __init__(self, tensor: Tensor) -> None:
        # A copy that does not block is into pinned memory.
        self._host = tensor.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def value(self) -> float:
        """The number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._host)


def device_name(device: torch.device) -> str:
    """What people call it: "NVIDIA H100 80GB HBM3", "Apple GPU", "CPU"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else "CPU"


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of this name; the best one for None.

    Raises:
        MobiusError: the device is unknown or not available.
    """
    try:
        return torch.empty(0, device=best_device() if device is None else device).device
    except (RuntimeError, AssertionError) as error:
        raise MobiusError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
