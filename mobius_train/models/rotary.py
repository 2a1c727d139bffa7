"""Rotary embedding of frame numbers (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch import Tensor


def rotate_by_frame(heads: Tensor, theta: float) -> Tensor:
    """Rotate each pair of neighbouring channels by the frame's number, in float32; (N, F, heads, D).

    Args:
        heads: queries or keys; D is even.
        theta: base of the frequencies.
    """
    frames = torch.arange(heads.shape[1], device=heads.device)
    angles = get_1d_rotary_pos_embed(heads.shape[-1], frames, theta, use_real=True)
    return apply_rotary_emb(heads, angles, sequence_dim=1)
