"""Small random encoders of frames, captions and videos, saved in transformers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import CLIPTokenizerFast

SIDE = 32
WIDTH = 8  # of CLIP's embeddings
LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _processor() -> transformers.CLIPImageProcessor:
    return transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def save_dino(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=SIDE, patch_size=8, initializer_range=0.5, **LAYERS)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    _processor().save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """With the words "a", "dog" and "d", "o", "g"; captions of at most 16 tokens."""
    torch.manual_seed(1)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=LAYERS | ends | {"vocab_size": 7, "max_position_embeddings": 16, "projection_dim": WIDTH},
        vision_config=LAYERS | {"image_size": SIDE, "patch_size": 8, "projection_dim": WIDTH},
        projection_dim=WIDTH,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "d": 2, "dog</w>": 3, "o": 4, "g</w>": 5, "a</w>": 6}
    CLIPTokenizerFast(vocab=vocabulary, merges=[], model_max_length=16).save_pretrained(folder)
    _processor().save_pretrained(folder)
    return folder


def save_head(path: Path, width: int = WIDTH) -> Path:
    generator = torch.Generator().manual_seed(2)
    save_file({"weight": torch.randn(1, width, generator=generator), "bias": torch.tensor([5.0])}, path)
    return path


def save_video_encoder(folder: Path, num_frames: int = 4) -> Path:
    torch.manual_seed(3)
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=num_frames, tubelet_size=2, initializer_range=0.5, **LAYERS
    )
    transformers.VideoMAEModel(config).save_pretrained(folder)
    _processor().save_pretrained(folder)
    return folder
