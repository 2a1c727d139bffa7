"""Check that a transformer can be a backbone of this family."""

from __future__ import annotations

from typing import Any

from diffusers import SD3Transformer2DModel

from mobius_train.errors import MobiusError
from mobius_train.models.tokens.check import block_problems


def check_sd3(model: Any) -> None:
    """Reject transformers that `SD3Backbone` does not support.

    Raises:
        MobiusError: lists every problem.
    """
    kind = SD3Transformer2DModel.__name__
    if not isinstance(model, SD3Transformer2DModel):
        raise MobiusError(f"a {type(model).__name__} cannot be a backbone here: give a {kind}")
    config = model.config
    problems = block_problems(config)
    width = config.num_attention_heads * config.attention_head_dim
    if config.caption_projection_dim != width:
        problems.append(
            f"caption_projection_dim={config.caption_projection_dim}: its blocks have {width} channels"
            f" ({config.num_attention_heads} heads of {config.attention_head_dim}), and so must the text"
        )
    if problems:
        raise MobiusError(
            f"this {kind} cannot be a backbone:\n  - "
            + "\n  - ".join(problems)
            + "\nUse a configuration as of Stable Diffusion 3 or 3.5"
        )
