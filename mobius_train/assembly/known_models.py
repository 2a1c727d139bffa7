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

# CLIP-L and CLIP-G of Stable Diffusion XL and 3.
_CLIP_L: Configuration = _SD15["text_encoder"]
_CLIP_G: Configuration = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
_SDXL: dict[str, Configuration] = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": _VAE,
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_G,
}
_SD3: dict[str, Configuration] = {
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    "vae": _VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "text_encoder": _CLIP_L | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 768},
    "text_encoder_2": _CLIP_G,
    # The encoder of T5 v1.1 XXL.
    "text_encoder_3": {
        "model_type": "t5",
        "architectures": ["T5EncoderModel"],
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "vocab_size": 32128,
    },
}
_SD35_MEDIUM: dict[str, Configuration] = _SD3 | {
    "transformer": _SD3["transformer"]
    | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}
}
_PIXART_SIGMA: dict[str, Configuration] = {
    "transformer": {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "use_additional_conditions": False,
    },
    "vae": _VAE,
    "scheduler": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "text_encoder": _SD3["text_encoder_3"],
}

# By hub name without the owner, which mirrors keep.
KNOWN: dict[str, dict[str, Configuration]] = {
    "stable-diffusion-2-1": _SD21,
    "stable-diffusion-2-1-base": _SD21,
    "stable-diffusion-2": _SD21,
    "stable-diffusion-2-base": _SD21,
    "stable-diffusion-v1-5": _SD15,
    "stable-diffusion-v1-4": _SD15,
    "stable-diffusion-xl-base-1.0": _SDXL,
    "stable-diffusion-3-medium-diffusers": _SD3,
    "stable-diffusion-3.5-medium": _SD35_MEDIUM,
    "PixArt-Sigma-XL-2-1024-MS": _PIXART_SIGMA,
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
