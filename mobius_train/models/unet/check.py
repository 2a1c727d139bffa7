"""Check that a 2D UNet can be a backbone."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

from mobius_train.conditions import POOLED, SIZE_NUMBERS
from mobius_train.errors import MobiusError
from mobius_train.models.unet.conditions import TEXT_AND_SIZES, condition_widths

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", None)
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")

# Conditions that video batches do not contain.
EXTRA_CONDITIONS = {
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
    "encoder_hid_dim": "a projection of the text or of an image",
    "encoder_hid_dim_type": "a projection of the text or of an image",
    "time_cond_proj_dim": "an embedded guidance scale (distilled models)",
}


def check_unet(unet: UNet2DConditionModel) -> None:
    """Reject UNets that `Walk` does not support.

    Raises:
        MobiusError: lists every unsupported configuration entry.
    """
    config = unet.config
    problems = [
        f"{name}={config[name]!r}: requires {meaning}"
        for name, meaning in EXTRA_CONDITIONS.items()
        if config.get(name) is not None
    ]
    problems += _problems_of_conditions(config)
    for name, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        unknown = [kind for kind in config[name] if kind not in allowed]
        if unknown:
            problems.append(f"{name} has {', '.join(map(str, unknown))}: only {' and '.join(allowed)} are supported")
    if config.mid_block_type not in MID_BLOCKS:
        problems.append(f"mid_block_type={config.mid_block_type!r}: only {MID_BLOCKS[0]} and none are supported")
    if config.dual_cross_attention:
        problems.append("dual_cross_attention=True: requires two texts")
    if config.attention_type != "default":
        problems.append(f"attention_type={config.attention_type!r}: requires grounding boxes (GLIGEN)")
    if config.norm_num_groups is None:
        problems.append("norm_num_groups=None: the temporal layers require the number of groups")
    if problems:
        raise MobiusError(
            f"this {type(unet).__name__} cannot be a backbone:\n  - "
            + "\n  - ".join(problems)
            + "\nUse a UNet with the conditions of Stable Diffusion 1.x, 2.x (timestep and text) or XL (and pooled text"
            " and sizes)"
        )


def _problems_of_conditions(config: Any) -> list[str]:
    added, width = config.addition_embed_type, config.cross_attention_dim
    if not isinstance(width, int):
        return [f"cross_attention_dim={width}: has a width of the text for each block, only one width is supported"]
    if added is None:
        return []
    if added != TEXT_AND_SIZES:
        return [f"addition_embed_type={added!r}: only {TEXT_AND_SIZES!r} is supported (pooled text and sizes)"]
    if config.addition_time_embed_dim is None:
        return ["addition_time_embed_dim=None: the embedding of the sizes requires a width"]
    if condition_widths(config)[POOLED] < 1:
        return [
            f"projection_class_embeddings_input_dim={config.projection_class_embeddings_input_dim}: has no room for"
            f" pooled text beside {SIZE_NUMBERS} sizes of addition_time_embed_dim={config.addition_time_embed_dim}"
        ]
    return []
