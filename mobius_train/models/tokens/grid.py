"""The tokens of a frame: patches of its latents, in rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mobius_train.errors import MobiusError


def token_grid(config: Mapping[str, Any], height: int, width: int) -> tuple[int, int]:
    """The tokens (h, w) of a frame of so many latents.

    Args:
        config: a transformer's configuration, with `patch_size`; and with `pos_embed_max_size` if it has positions for
            so many patches along a side alone.

    Raises:
        MobiusError: the transformer has no tokens for this size.
    """
    patch, most = int(config["patch_size"]), config.get("pos_embed_max_size")
    if height % patch or width % patch:
        raise MobiusError(
            f"latents of {height} x {width} cannot be divided into patches of {patch}: choose a height and width whose"
            f" latents are multiples of {patch}"
        )
    grid = height // patch, width // patch
    if most is not None and max(grid) > most:
        raise MobiusError(
            f"latents of {grid[0]} x {grid[1]} patches: this transformer has positions for at most {most} x {most}"
            f" (pos_embed_max_size). Use a height and width of at most {most * patch} latents"
        )
    return grid
