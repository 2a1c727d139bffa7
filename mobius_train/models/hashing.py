"""Hash of a set of weights."""

from __future__ import annotations

import hashlib
from itertools import chain
from operator import itemgetter

import torch
from torch import nn


def weights_hash(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 (64 hex digits) of all parameters and buffers: names, shapes, dtypes and bytes, sorted by name.

    The device and `requires_grad` do not affect the hash.

    Args:
        dtype: cast floating-point tensors to this type first; default: as they are.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(chain(module.named_parameters(), module.named_buffers()), key=itemgetter(0)):
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.detach().to(dtype)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
