"""The attention layers of a ring beside a transformer: over frames, and to the text of the first frame.

Legend: B clips, F frames; N = B·F frames, ordered clip by clip; S image tokens of a frame, L text tokens, D width,
d channels of a head.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch import Tensor, nn

from mobius_train.models.attention import TemporalProcessor, attend

# Base of the rotary embedding of frame numbers.
THETA = 1e4


class FrameProcessor(TemporalProcessor):
    """TA: each position attends to itself in all frames of its clip. Queries and keys are rotated by frame number."""

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        num_frames: int = 1,
    ) -> Tensor:
        """(N, S, D) → (N, S, D)."""
        query, key, value = (
            part.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(0, 1)
            for part in self.projected(attn, hidden_states, hidden_states)
        )
        rotation = get_1d_rotary_pos_embed(
            query.shape[-1], torch.arange(num_frames, device=query.device), THETA, use_real=True
        )
        query, key = (apply_rotary_emb(part, rotation, sequence_dim=1) for part in (query, key))
        result = attend(self.backend, query, key, value)
        positions = result.unflatten(0, (-1, hidden_states.shape[1]))
        return self.output(attn, positions.transpose(1, 2).flatten(0, 1))


class TextProcessor(TemporalProcessor):
    """FA: all tokens of a clip attend to one text (Vchitect-2.0's cross branch)."""

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(N, S, D), text (B, L, text channels), and the bias of its scores, (B, 1, L) → (N, S, D)."""
        clips = hidden_states.unflatten(0, (len(encoder_hidden_states), -1)).flatten(1, 2)
        result = super().__call__(attn, clips, encoder_hidden_states, attention_mask)
        return result.view_as(hidden_states)


def frame_attention(channels: int, heads: int) -> Attention:
    """TA, with normalised queries and keys."""
    return _attention(FrameProcessor("sdpa"), channels, heads, None)


def text_attention(channels: int, heads: int, text_channels: int) -> Attention:
    """FA, with normalised queries and keys."""
    return _attention(TextProcessor("sdpa"), channels, heads, text_channels)


def _attention(processor: TemporalProcessor, channels: int, heads: int, of_keys: int | None) -> Attention:
    head = channels // heads
    layer = Attention(
        query_dim=channels,
        cross_attention_dim=of_keys,
        heads=heads,
        dim_head=head,
        bias=True,
        processor=processor,
    )
    # One fused operator that saves its input alone. A bias of all keys would have no effect.
    layer.norm_q, layer.norm_k = (nn.LayerNorm(head, eps=1e-6, bias=False) for _ in range(2))
    return layer
