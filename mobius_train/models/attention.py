"""Attention kernels, and their installation in a model.

Legend: N batch, L sequence length, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

AttentionBackend = Literal["sdpa", "flash_attn", "eager"]

# CUDA's attention kernels use the batch as a grid axis, which has this limit (pytorch#142228).
MAX_BATCH = 65535


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention; all (N, L, heads, D)."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    mask = None if bias is None else bias.unsqueeze(1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def flash_attn(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """The flash-attn package, called through diffusers; `sdpa` with a bias, which flash-attn does not have.

    All (N, L, heads, D).
    """
    if bias is not None:
        return sdpa(query, key, value, bias)
    return dispatch_attention_fn(query, key, value, backend=AttentionBackendName.FLASH)


def eager(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(QK^T / sqrt(D)) V, with the probabilities stored in memory; all (N, L, heads, D)."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    scores = scores if bias is None else scores + bias.unsqueeze(1)
    return scores.softmax(-1).matmul(value).transpose(1, 2)


KERNELS: dict[AttentionBackend, Callable[..., Tensor]] = {
    "sdpa": sdpa,
    "flash_attn": flash_attn,
    "eager": eager,
}


def attend(backend: AttentionBackend, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """One of `KERNELS` at any batch size; all (N, L, heads, D).

    Args:
        bias: added to the scores, (N, 1, length of the keys).
    """
    given = [query, key, value] if bias is None else [query, key, value, bias]
    pieces = zip(*(each.split(MAX_BATCH) for each in given), strict=True)
    results = [KERNELS[backend](*piece) for piece in pieces]
    return results[0] if len(results) == 1 else torch.cat(results)


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
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(N, L, C), and for cross-attention (N, text length, text width) → (N, L, C).

        Args:
            attention_mask: the bias of the scores, (N, 1, text length), as diffusers' blocks give it.
        """
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = self.projected(attn, hidden_states, source)
        return self.output(attn, attend(self.backend, *parts, attention_mask))

    def projected(self, attn: Attention, hidden: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (N, L, heads, D), key and value (N, length of the source, heads, D), normalised if `attn` does so."""
        query, key, value = (
            projection(tensor).unflatten(-1, (attn.heads, -1))
            for projection, tensor in ((attn.to_q, hidden), (attn.to_k, source), (attn.to_v, source))
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        return query, key, value

    def output(self, attn: Attention, result: Tensor) -> Tensor:
        """(N, L, heads, D) → (N, L, C), by the output projection."""
        projection, dropout = attn.to_out
        return dropout(projection(result.flatten(-2)))


class JointProcessor(KernelProcessor):
    """Processor for self-attention over image tokens, and text tokens if there are any, with projections of their own.

    With sdpa it computes what JointAttnProcessor2_0 does, diffusers' default for Stable Diffusion 3.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image (N, S, C), and text (N, L, C) or none → the same shapes."""
        parts = self.projected(attn, hidden_states, hidden_states)
        if encoder_hidden_states is None:
            return self.output(attn, attend(self.backend, *parts))
        text = [
            projection(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
            for projection in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        ]
        if attn.norm_added_q is not None:
            text[:2] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
        both = attend(self.backend, *(torch.cat(pair, dim=1) for pair in zip(parts, text, strict=True)))
        image, of_text = both.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        of_text = of_text.flatten(-2)
        return self.output(attn, image), of_text if attn.context_pre_only else attn.to_add_out(of_text)


class TemporalProcessor(KernelProcessor):
    """Processor for the attention layers of a trained temporal branch.

    This one is for self-attention over frames: one sequence per clip and position, so N is large and L is small.
    """


def set_attention_backend(module: nn.Module, backend: AttentionBackend, temporal: bool) -> None:
    """Set the kernel of the temporal attention layers in `module`, or of all other attention layers."""
    for layer in attention_layers(module, temporal):
        layer.set_processor(_processor(layer.processor, backend))


def _processor(current: Any, backend: AttentionBackend) -> Any:
    """The processor that computes what the current one does, with another kernel."""
    if isinstance(current, KernelProcessor) and type(current) not in (KernelProcessor, JointProcessor):
        # A processor of one kind of layer.
        return type(current)(backend)
    # diffusers' own processors leave a frozen model unmodified.
    if isinstance(current, JointAttnProcessor2_0 | JointProcessor):
        return JointAttnProcessor2_0() if backend == "sdpa" else JointProcessor(backend)
    if backend == "flash_attn":
        return KernelProcessor(backend)
    return {"sdpa": AttnProcessor2_0, "eager": AttnProcessor}[backend]()


def attention_layers(module: nn.Module, temporal: bool) -> list[Any]:
    """The temporal attention layers in `module`, or all other attention layers."""
    layers = [each for each in module.modules() if isinstance(each, Attention)]
    return [each for each in layers if isinstance(each.processor, TemporalProcessor) == temporal]
