"""Check that a transformer can be a backbone of this family."""

from __future__ import annotations

from typing import Any

from diffusers import PixArtTransformer2DModel

from mobius_train.errors import MobiusError
from mobius_train.models.tokens.check import block_problems


def check_pixart(model: Any) -> None:
    """Reject transformers that `PixArtBackbone` does not support.

    Raises:
        MobiusError: lists every problem.
    """
    kind = PixArtTransformer2DModel.__name__
    if not isinstance(model, PixArtTransformer2DModel):
        raise MobiusError(f"a {type(model).__name__} cannot be a backbone here: give a {kind}")
    config, problems = model.config, block_problems(model.config)
    width = config.num_attention_heads * config.attention_head_dim
    if config.cross_attention_dim != width:
        problems.append(
            f"cross_attention_dim={config.cross_attention_dim}: its blocks have {width} channels"
            f" ({config.num_attention_heads} heads of {config.attention_head_dim}), and so must the text"
        )
    if config.out_channels not in (None, config.in_channels, 2 * config.in_channels):
        problems.append(
            f"out_channels={config.out_channels}: it must be in_channels={config.in_channels}, or twice as many for a"
            " variance beside the prediction"
        )
    if config.attention_type != "default":
        problems.append(f"attention_type={config.attention_type!r}: nothing gives its blocks their further inputs")
    if model.use_additional_conditions and width % 3:
        problems.append(f"use_additional_conditions=true: its blocks have {width} channels, which 3 must divide")
    if problems:
        raise MobiusError(
            f"this {kind} cannot be a backbone:\n  - "
            + "\n  - ".join(problems)
            + "\nUse a configuration as of PixArt-α or PixArt-Σ"
        )
