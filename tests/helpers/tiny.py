"""Small random pipelines and clips, laid out as the real ones, made in a folder of the test's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import (
    BertTokenizerFast,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPTextConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizerFast,
)

WIDTH = 32
FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
}
KINDS: dict[str, dict[str, Any]] = {
    # Attention in every level, as in the emoji backbone; the text is real MiniLM's.
    "emoji": TWO_LEVELS | {"cross_attention_dim": 384},
    # The smallest that Stable Diffusion's text encoder goes with.
    "small": TWO_LEVELS | {"cross_attention_dim": WIDTH},
    "sd15": FOUR_LEVELS | {"attention_head_dim": 8, "cross_attention_dim": WIDTH},
    "sd21": FOUR_LEVELS
    | {"attention_head_dim": (1, 1, 2, 2), "use_linear_projection": True, "cross_attention_dim": WIDTH},
}


def save_vae(folder: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        sample_size=32,
    ).save_pretrained(folder)


def save_pipeline(folder: Path, kind: str = "emoji") -> Path:
    """unet/, vae/, scheduler/ and, for the kinds of Stable Diffusion, a CLIP text encoder."""
    save_vae(folder / "vae")
    torch.manual_seed(1)
    UNet2DConditionModel(sample_size=8, **KINDS[kind]).save_pretrained(folder / "unet")
    DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon" if kind == "sd15" else "v_prediction",
        clip_sample=False,
    ).save_pretrained(folder / "scheduler")
    if kind != "emoji":
        save_clip_text(folder)
    return folder


def save_clip_text(folder: Path) -> None:
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "d": 2, "dog</w>": 3, "o": 4, "g</w>": 5}
    CLIPTokenizerFast(vocab=vocabulary, merges=[], model_max_length=16).save_pretrained(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=6,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(folder / "text_encoder")


def save_chinese_clip(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "笑", "脸"]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    tower = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": WIDTH,
    }
    text = ChineseCLIPTextConfig(vocab_size=7, **tower)
    vision = tower | {"image_size": 8, "patch_size": 4}
    ChineseCLIPModel(ChineseCLIPConfig(text_config=text.to_dict(), vision_config=vision)).save_pretrained(folder)
    return folder


def save_clips(folder: Path, count: int = 10, frames: int = 4, size: int = 32) -> Path:
    """Animated GIFs of a disc that moves, captions in two languages in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        pictures = []
        for frame in range(frames):
            picture = Image.new("RGB", (size, size), "white")
            x = (number * 5 + frame * 4) % (size - 8)
            ImageDraw.Draw(picture).ellipse((x, number % 20, x + 8, number % 20 + 8), fill=(number * 20 % 256, 80, 160))
            pictures.append(picture)
        name = f"clip{number:02d}.gif"
        pictures[0].save(folder / name, save_all=True, append_images=pictures[1:], duration=100)
        lines.append(json.dumps({"file_name": name, "text": f"dog number {number}"}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
