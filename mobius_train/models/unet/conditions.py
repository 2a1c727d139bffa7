"""The conditions of a 2D UNet, from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mobius_train.conditions import POOLED, SIZE_NUMBERS, SIZES, TEXT

# The value of `addition_embed_type` of Stable Diffusion XL: pooled text and sizes are added to the time embedding.
TEXT_AND_SIZES = "text_time"


def condition_widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Size of the last axis of each condition, by name.

    Args:
        config: of a UNet that `check_unet` accepts, or of a UNet3DConditionModel.
    """
    widths = {TEXT: int(config["cross_attention_dim"])}
    if config.get("addition_embed_type") == TEXT_AND_SIZES:
        of_sizes = SIZE_NUMBERS * int(config["addition_time_embed_dim"])
        widths[POOLED] = int(config["projection_class_embeddings_input_dim"]) - of_sizes
        widths[SIZES] = SIZE_NUMBERS
    return widths
