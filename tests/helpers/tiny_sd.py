"""Tiny pipeline folders of Stable Diffusion XL, 3 and PixArt, as diffusers saves them: random, with all their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

# Widths of the text encoders, which differ so that no two can be mistaken for each other.
CLIP_L, CLIP_G, T5 = 16, 24, 48
PROJECTION_L, PROJECTION_G = 12, 20
TOKENS = 16
LETTERS = "adgoberhmnu"


def save_sdxl(folder: Path) -> Path:
    """With a text of 40, a pooled text of 20 and sizes; 4 latent channels, 2 levels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=CLIP_L + CLIP_G,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + PROJECTION_G,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025),
        unet=unet,
        # As XL's: of another class than the training needs.
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
        text_encoder=_clip(CLIP_L, None),
        text_encoder_2=_clip(CLIP_G, PROJECTION_G),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer("!"),
        add_watermarker=False,
    )
    return _saved(pipeline, folder)


def save_sd3(folder: Path, with_t5: bool = True, text: int = T5, pooled: int = PROJECTION_L + PROJECTION_G) -> Path:
    """With these widths of text and pooled text; 16 latent channels, patches of 2."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=text,
        caption_projection_dim=32,
        pooled_projection_dim=pooled,
        pos_embed_max_size=16,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=_clip(CLIP_L, PROJECTION_L),
        text_encoder_2=_clip(CLIP_G, PROJECTION_G),
        text_encoder_3=_t5() if with_t5 else None,
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer("!"),
        tokenizer_3=_t5_tokenizer() if with_t5 else None,
    )
    return _saved(pipeline, folder)


def save_pixart(folder: Path, sigma: bool = False) -> Path:
    """With a text of 48; 4 latent channels, a variance, patches of 2. PixArt-α takes sizes, as that of 1024 px."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        cross_attention_dim=48,
        caption_channels=T5,
        use_additional_conditions=not sigma,
    )
    pipeline = (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        transformer=transformer,
        vae=_vae(4, scaling_factor=0.18215),
        # As PixArt's: of another class than the training needs.
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
    )
    return _saved(pipeline, folder)


def _saved(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def _vae(channels: int, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        sample_size=32,
        **options,
    )


def _clip(width: int, projection: int | None) -> PreTrainedModel:
    config = CLIPTextConfig(
        vocab_size=len(LETTERS) + len(LETTERS) + 3,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=projection or width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.5,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def clip_tokenizer(padding: str) -> CLIPTokenizerFast:
    """Words are spelt; a letter at the end of a word is another token."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2}
    vocabulary |= {letter: 3 + place for place, letter in enumerate(LETTERS)}
    vocabulary |= {f"{letter}</w>": 3 + len(LETTERS) + place for place, letter in enumerate(LETTERS)}
    return CLIPTokenizerFast(vocab=vocabulary, merges=[], model_max_length=TOKENS, pad_token=padding)


def _t5() -> PreTrainedModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=20,
            d_model=T5,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            # As in Stable Diffusion 3.
            tie_word_embeddings=False,
            initializer_factor=2.0,
        )
    )


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
