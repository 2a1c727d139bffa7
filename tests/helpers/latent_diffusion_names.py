"""The names that Stable Diffusion's first files give its weights, made from those of diffusers.

After scripts/convert_diffusers_to_original_stable_diffusion.py of diffusers; four levels, two layers in each.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

UNET = [
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
]
RESNET = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("time_emb_proj.", "emb_layers.1."),
    ("conv_shortcut.", "skip_connection."),
]
ATTENTION = [
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
]


CLIP = [
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding.", "token_embedding."),
    ("final_layer_norm.", "ln_final."),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    (".self_attn.", ".attn."),
]


def single_file(folder: Path, open_clip: bool = False) -> dict[str, Tensor]:
    """All weights of a pipeline folder of Stable Diffusion 1.x, or 2.x (`open_clip`), in one dictionary."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    levels = len(vae.config.block_out_channels)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    clip = {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
    return (
        {f"model.diffusion_model.{_unet(name)}": tensor for name, tensor in unet.items()}
        | {f"first_stage_model.{_vae(n, levels)}": _vae_tensor(n, t) for n, t in vae.state_dict().items()}
        | (_open_clip(text) if open_clip else clip)
    )


def _open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP has the three projections of an attention layer in one tensor."""
    state = {}
    for name, tensor in text.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([text[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".q_proj.", ".in_proj_")
        for ours, theirs in CLIP:
            name = name.replace(ours, theirs)
        state[f"cond_stage_model.model.{name}"] = tensor
    return state


def _unet(name: str) -> str:
    if "resnets" in name:
        for ours, theirs in RESNET:
            name = name.replace(ours, theirs)
    if name.startswith("conv_in."):
        return name.replace("conv_in.", "input_blocks.0.0.")
    for ours, theirs in UNET:
        if name.startswith(ours):
            return name.replace(ours, theirs, 1)
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    assert match is not None, name
    side, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
    place = 0 if kind == "resnets" else 1
    number = 3 * level + layer + (1 if side == "down" else 0)
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{place}.{rest}"


def _vae(name: str, levels: int) -> str:
    if "mid_block.attentions" in name:
        for ours, theirs in ATTENTION:
            name = name.replace(ours, theirs)
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}.", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)


def _vae_tensor(name: str, tensor: Tensor) -> Tensor:
    """Attention's linear layers are 1x1 convolutions there."""
    is_linear = "mid_block.attentions" in name and tensor.ndim == 2
    return tensor[:, :, None, None] if is_linear else tensor
