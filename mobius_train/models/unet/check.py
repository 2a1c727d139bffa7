"""Check that a 2D UNet can be a backbone."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from mobius_train.errors import MobiusError

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", None)
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")

# Conditions other than the timestep and the text; video batches do not contain them.
EXTRA_CONDITIONS = {
    "addition_embed_type": "added conditions (SDXL's sizes and pooled text)",
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
            + "\nUse a UNet with only timestep and text conditions, as in Stable Diffusion 1.x, 2.x"
        )
