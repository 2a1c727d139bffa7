"""One layer of the ring beside a transformer.

    Δ(t) = y + γ2·FF(AdaLN2(t + y))
    y    = γ1·(TA(u) + FA(u, c⁰) + MIX(u)),  u = AdaLN1(t)

TA is attention over frames, FA attention to the text of the clip's first frame, MIX a convolution over frames and
positions, FF a feed-forward layer, γ a gate.

Legend: B clips, F frames; N = B·F frames, ordered clip by clip; S = h·w image tokens of a frame, L text tokens,
D the layer's width, T the backbone's.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional as F

from mobius_train.models.tokens.attention import frame_attention, text_attention
from mobius_train.sequence.group import SequenceGroup
from mobius_train.sequence.rows import neighbour_rows

EPS = 1e-6


class Clip(NamedTuple):
    """What the layers of a ring take besides their states.

    The ranks of a sequence group share the tokens of every frame: their states have S_r tokens instead of S.
    """

    num_frames: int
    grid: tuple[int, int]
    """(h, w)"""
    bias: Tensor | None = None
    """What FA adds to its scores of the text, (B, 1, L): a large negative number for padding, else 0."""
    sequence: SequenceGroup | None = None


class Modulation(nn.Module):
    """Shift, scale and gate of both halves of all layers, from the embedded time; each layer adds a table to them."""

    def __init__(self, time_channels: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(time_channels, 6 * channels)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, time: Tensor) -> Tensor:
        """(N, T) → (N, 6, D)."""
        return self.projection(F.silu(time)).unflatten(-1, (6, -1))


class Mixing(nn.Module):
    """MIX: a depthwise convolution over frames and positions, an activation, and a projection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.projection = nn.Linear(channels, channels)

    def forward(self, hidden: Tensor, clip: Clip) -> Tensor:
        """(N, S, D) → (N, S, D)."""
        rows, own = neighbour_rows(hidden, clip.grid, clip.sequence)
        clips = rows.unflatten(1, (-1, clip.grid[1])).unflatten(0, (-1, clip.num_frames))
        mixed = self.convolution(clips.movedim(-1, 1)).movedim(1, -1)
        return self.projection(F.silu(mixed.flatten(0, 1).flatten(1, 2)[:, own]))


class TokenLayer(nn.Module):
    """Δ, see above. It starts as an ordinary layer.

    Args:
        channels: D.
        heads: attention heads of TA and FA.
        of_backbone: T.
        context_latents: learned tokens beside the text.
        entering: the layer's state is the sum of t and a learned projection of the backbone's tokens.
    """

    def __init__(self, channels: int, heads: int, of_backbone: int, context_latents: int, entering: bool) -> None:
        super().__init__()
        self.entry = nn.Linear(of_backbone, channels) if entering else None
        self.table = nn.Parameter(torch.zeros(6, channels))
        self.latents = nn.Parameter(torch.randn(context_latents, of_backbone)) if context_latents else None
        self.frames = frame_attention(channels, heads)
        self.text = text_attention(channels, heads, of_backbone)
        self.mixing = Mixing(channels)
        self.feed_forward = FeedForward(channels, mult=2, activation_fn="gelu-approximate")

    def forward(self, state: Tensor, hidden: Tensor | None, text: Tensor, modulation: Tensor, clip: Clip) -> Tensor:
        """
        Args:
            state: t, (N, S, D).
            hidden: the backbone's tokens, (N, S, T), for a layer that they enter.
            text: of each clip's first frame, (B, L, T).
            modulation: (N, 6, D).

        Returns:
            Δ(t), (N, S, D).
        """
        if self.entry is not None:
            assert hidden is not None
            # A transformer's residual stream has a few huge channels.
            state = state + self.entry(F.layer_norm(hidden, hidden.shape[-1:], eps=EPS))
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table)[:, :, None].unbind(1)
        u = _normalised(state, shift1, scale1)
        of_text = self.text(u, self._keys(text), attention_mask=self._bias(clip))
        y = (1 + gate1) * (self.frames(u, num_frames=clip.num_frames) + of_text + self.mixing(u, clip))
        return y + (1 + gate2) * self.feed_forward(_normalised(state + y, shift2, scale2))

    def zero_outputs(self) -> None:
        """Turn Δ into 0, the initial state of a layer behind the fusion."""
        for last in (self.frames.to_out[0], self.text.to_out[0], self.mixing.projection, self.feed_forward.net[-1]):
            nn.init.zeros_(cast(nn.Linear, last).weight)
            nn.init.zeros_(cast(nn.Linear, last).bias)

    def _keys(self, text: Tensor) -> Tensor:
        """What FA attends to, (B, L + context latents, T)."""
        text = F.layer_norm(text, text.shape[-1:], eps=EPS)
        return text if self.latents is None else torch.cat([text, self.latents.expand(len(text), -1, -1)], dim=1)

    def _bias(self, clip: Clip) -> Tensor | None:
        """The scores' bias of these keys, (B, 1, L + context latents)."""
        if clip.bias is None or self.latents is None:
            return clip.bias
        return F.pad(clip.bias, (0, len(self.latents)))


def _normalised(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: (N, S, D), and (N, 1, D) twice."""
    return F.layer_norm(hidden, hidden.shape[-1:], eps=EPS) * (1 + scale) + shift


def bytes_per_flop(channels: int) -> float:
    """Saved values per multiplication in a forward pass of a `TokenLayer`, up to a factor common to all layers.

    A token saves 23 states of width D: norms, q, k, v before and after their norms, results of attention, convolution
    and activations, a feed-forward layer twice as wide. It takes 13 D² multiplications. Attention over few frames and
    tokens is neglected.
    """
    return 23 / (13 * channels)


def tail_bytes_per_flop(channels: int, temporal: bool, trained: bool) -> float:
    """As `bytes_per_flop`, for a frozen or trained block behind the fusion, with a temporal layer or without.

    A frozen block saves the inputs of norms, attention and activations alone: 10 states. A trained one saves those of
    its projections too, 21 states. It takes 12 D² multiplications.
    """
    values, products = 21 if trained else 10, 12
    if temporal:
        values, products = values + 23, products + 13
    return values / (products * channels)
