"""A text encoder on its own, as the parts of a recipe contain it."""

from __future__ import annotations

import torch

from mobius_train.encoders.text_encoder import TextEncoder, load_text_model


def load_text_encoder(name_or_path: str, device: torch.device, max_tokens: int | None = None) -> TextEncoder:
    model, tokenizer = load_text_model(name_or_path)
    return TextEncoder(model, tokenizer, device, max_tokens)
