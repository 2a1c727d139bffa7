"""Which of a pipeline's text encoders encode captions, and how: by the parts that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mobius_train.conditions import MASK, TEXT
from mobius_train.encoders.clip_towers import T5_PART, T5_TOKENS, ClipTowers, Sd3Text, XlText, has_projection
from mobius_train.encoders.masked_text import MaskedText, pipeline_tokens
from mobius_train.encoders.text_encoder import PART, TextEncoder, load_text_model, tokenizer_part
from mobius_train.encoders.text_encoding import TextEncoding
from mobius_train.errors import MobiusError
from mobius_train.pretrained.model_names import resolve_package
from mobius_train.pretrained.pipeline_index import named_parts

CLIP_PARTS = (PART, "text_encoder_2")
TEXT_PARTS = (*CLIP_PARTS, T5_PART)
# Kinds of models, as transformers' configurations name them.
CLIP_TYPES, T5_TYPE = ("clip", "clip_text_model"), "t5"


def text_parts(name_or_path: str, use_t5: bool | None = None) -> list[str]:
    """The text encoders that a folder or hub model has; `text_encoder` alone for what is no pipeline.

    Args:
        use_t5: false: without T5; true: T5 must be there; None: T5 if it is there.

    Raises:
        MobiusError: T5 is required, and not there; the source has a single text encoder, which use_t5 does not choose;
            or the pipeline's index is damaged.
    """
    return choose_text_parts(named_parts(resolve_package(name_or_path)), name_or_path, use_t5)


def choose_text_parts(named: Sequence[str], source: str, use_t5: bool | None) -> list[str]:
    """As `text_parts`, for a source with the parts `named`."""
    found = [part for part in TEXT_PARTS if part in named] or [PART]
    if use_t5 is not None and found == [PART]:
        raise MobiusError(
            f"use_t5={str(use_t5).lower()} is for Stable Diffusion 3, but {source} has a single text encoder: remove it"
        )
    if use_t5 and T5_PART not in found:
        raise MobiusError(
            f"use_t5=true, but {source} has no {T5_PART}: add this folder and tokenizer_3 to the model, or set"
            " use_t5=false to train without T5"
        )
    return [part for part in found if part != T5_PART] if use_t5 is False else found


def load_text_encoding(
    name_or_path: str,
    device: torch.device,
    max_tokens: int | None = None,
    wanted: Mapping[str, int] | None = None,
    use_t5: bool | None = None,
) -> TextEncoding:
    """Load all text encoders of a folder, a hub name or `package:NAME`; see `make_text_encoding`.

    Args:
        use_t5: see `text_parts`.

    Raises:
        MobiusError: see `text_parts`, `load_text_model` and `make_text_encoding`.
    """
    models: dict[str, Any] = {}
    for part in text_parts(name_or_path, use_t5):
        try:
            models[part], models[tokenizer_part(part)] = load_text_model(name_or_path, part)
        except MobiusError as error:
            if part != T5_PART:
                raise
            raise MobiusError(f"{error}. To do without T5, set use_t5=false") from error
    return make_text_encoding(models, device, max_tokens or pipeline_tokens(name_or_path), wanted)


def make_text_encoding(
    components: Mapping[str, Any],
    device: torch.device,
    max_tokens: int | None = None,
    wanted: Mapping[str, int] | None = None,
) -> TextEncoding:
    """The text encoding of a pipeline's components.

    A single text encoder gives its last hidden states, and their mask if the backbone takes one. Two CLIP encoders are
    those of Stable Diffusion XL, or those of Stable Diffusion 3 if the first has a projection.

    Args:
        components: text encoders and tokenizers by part; others and None are ignored.
        max_tokens: tokens of a caption. With two CLIP encoders and T5 it applies to T5, present or not.
        wanted: the backbone's `condition_widths`; by default a text of any width.

    Raises:
        MobiusError: these text encoders do not go together, or `max_tokens` is too large.
    """
    wanted = {TEXT: 0} if wanted is None else wanted
    models = {part: components[part] for part in TEXT_PARTS if components.get(part) is not None}
    tokenizers = {part: components[tokenizer_part(part)] for part in models}
    if list(models) == [PART]:
        kind = MaskedText if MASK in wanted else TextEncoder
        return kind(models[PART], tokenizers[PART], device, max_tokens, wanted)

    types = {part: model.config.model_type for part, model in models.items()}
    clips = [models[part] for part in CLIP_PARTS if types.get(part) in CLIP_TYPES]
    projections = [has_projection(model) for model in clips]
    is_xl = projections == [False, True] and T5_PART not in models
    is_sd3 = projections == [True, True] and types.get(T5_PART, T5_TYPE) == T5_TYPE
    if not is_xl and not is_sd3:
        listed = ", ".join(f"{part}: {type(model).__name__}" for part, model in models.items())
        raise MobiusError(
            f"these text encoders are not a supported combination ({listed}): supported are one text encoder;"
            " those of Stable Diffusion XL (CLIP, and CLIP with a projection); and those of Stable Diffusion 3 (two"
            " CLIP with projections, T5 or none)"
        )

    towers: dict[str, TextEncoder] = {}
    tokens = max_tokens if is_xl else None
    for part in CLIP_PARTS:
        towers[part] = TextEncoder(models[part], tokenizers[part], device, tokens)
        # As in diffusers, all have the first one's number of tokens.
        tokens = towers[part].max_tokens
    if is_xl:
        return XlText(towers)
    t5_tokens, t5 = max_tokens or T5_TOKENS, None
    if T5_PART in models:
        t5 = TextEncoder(models[T5_PART], tokenizers[T5_PART], device, t5_tokens)
    pair = ClipTowers(towers)
    width = wanted[TEXT] or (pair.shapes()[TEXT][1] if t5 is None else t5.width)
    return Sd3Text(pair, t5, width, t5_tokens)
