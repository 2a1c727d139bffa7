"""Attention kernels, and their installation in a model.

Legend: N batch, L sequence length, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

AttentionBackend = Literal["sdpa", "flash_attn", "eager"]

# CUDA's attention kernels use the batch as a grid axis, which has this limit (pytorch#142228).
MAX_BATCH = 65535


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention; all (N, L, heads, D)."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def flash_attn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The flash-attn package, called through diffusers; all (N, L, heads, D)."""
    return dispatch_attention_fn(query, key, value, backend=AttentionBackendName.FLASH)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(QK^T / sqrt(D)) V, with the probabilities stored in memory; all (N, L, heads, D)."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return ((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(-1).matmul(value).transpose(1, 2)


KERNELS: dict[AttentionBackend, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": sdpa,
    "flash_attn": flash_attn,
    "eager": eager,
}


class KernelProcessor:
    """Attention processor for transformer blocks that uses one of `KERNELS` at any batch size.

    Pass it to `Attention.set_processor`. With sdpa it matches AttnProcessor2_0, diffusers' default.
    """

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """(N, L, C), and for cross-attention (N, text length, text width) → (N, L, C)."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        pieces = zip(*(x.unflatten(-1, (attn.heads, -1)).split(MAX_BATCH) for x in projected), strict=True)
        results = [KERNELS[self.backend](*piece) for piece in pieces]
        result = results[0] if len(results) == 1 else torch.cat(results)
        projection, dropout = attn.to_out
        return dropout(projection(result.flatten(-2)))


class TemporalProcessor(KernelProcessor):
    """Processor for self-attention over frames: one sequence per clip and position, so N is large and L is small."""


def set_attention_backend(module: nn.Module, backend: AttentionBackend, temporal: bool) -> None:
    """Set the kernel of the temporal attention layers in `module`, or of all other attention layers."""
    processor: Any = KernelProcessor(backend)
    if temporal:
        processor = TemporalProcessor(backend)
    elif backend != "flash_attn":
        # diffusers' own processors leave the frozen UNet unmodified.
        processor = {"sdpa": AttnProcessor2_0, "eager": AttnProcessor}[backend]()
    for layer in attention_layers(module, temporal):
        layer.set_processor(processor)


def attention_layers(module: nn.Module, temporal: bool) -> list[Any]:
    """The temporal attention layers in `module`, or all other attention layers."""
    layers = [each for each in module.modules() if isinstance(each, Attention)]
    return [each for each in layers if isinstance(each.processor, TemporalProcessor) == temporal]
