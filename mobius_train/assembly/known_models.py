"""Configurations of well-known public models, for machines without their files and without hub access.

They contain the entries of the models' config.json files that determine sizes; other entries are class defaults.
"""

from __future__ import annotations

from typing import Any

Configuration = dict[str, Any]

_DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3

_UNET: Configuration = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": _DOWN,
    "up_block_types": _UP,
}
_VAE: Configuration = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SD21: dict[str, Configuration] = {
    "unet": _UNET
    | {
        "sample_size": 96,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "vae": _VAE,
    # The text tower of OpenCLIP ViT-H/14, without its last layer.
    "text_encoder": {
        "model_type": "clip_text_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
}
_SD15: dict[str, Configuration] = {
    "unet": _UNET | {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
    "vae": _VAE,
    # The text tower of CLIP ViT-L/14.
    "text_encoder": {
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
}

# By hub name without the owner, which mirrors keep.
KNOWN: dict[str, dict[str, Configuration]] = {
    "stable-diffusion-2-1": _SD21,
    "stable-diffusion-2-1-base": _SD21,
    "stable-diffusion-2": _SD21,
    "stable-diffusion-2-base": _SD21,
    "stable-diffusion-v1-5": _SD15,
    "stable-diffusion-v1-4": _SD15,
    # The text tower is a RoBERTa-large.
    "chinese-clip-vit-huge-patch14": {
        "text_encoder": {
            "model_type": "chinese_clip_text_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 512,
            "vocab_size": 21128,
        }
    },
}
