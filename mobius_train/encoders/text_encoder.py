"""A frozen text encoder with its tokenizer, which maps captions to embeddings.

CLIP (Stable Diffusion), Chinese CLIP (used in the paper), BERT-like encoders (MiniLM) and T5 are loaded from a folder,
a hub name, or `package:NAME`, a Python package that contains a model folder.

Legend: L text tokens, D width of the hidden states, P width of a projection.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    ChineseCLIPModel,
    ChineseCLIPTextModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.errors import MobiusError
from mobius_train.models import weights_hash
from mobius_train.pretrained.model_names import resolve_package
from mobius_train.pretrained.strict_load import find_model, load_object, load_transformers

logger = logging.getLogger(__name__)

# A pipeline's part with its only or first text encoder.
PART = "text_encoder"
# A CLIP folder contains both towers or only the text tower. Chinese CLIP's text tower cannot load from a folder of the
# whole model, where the weights have other names, so the whole model is loaded and its text tower used.
CLASSES: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPTextModel,
    "clip_text_model": CLIPTextModel,
    "chinese_clip": ChineseCLIPModel,
    "chinese_clip_text_model": ChineseCLIPTextModel,
    # T5's decoder has no use here.
    "t5": T5EncoderModel,
}


class Tokens(NamedTuple):
    """ids, mask: (1, L); the mask is 0 for padding."""

    ids: Tensor
    mask: Tensor


class TextEncoder:
    """A frozen text encoder with its tokenizer; see TextEncoding.

    `text` are its last hidden states, `pooled` is their mean over the tokens that are not padding.

    Args:
        max_tokens: the length to which captions are padded and truncated; None: the tokenizer's maximum.
        wanted: the names of the backbone's conditions; `pooled` is encoded only if it is among them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        max_tokens: int | None = None,
        wanted: Collection[str] = (TEXT,),
    ) -> None:
        self.model = model.requires_grad_(False).eval().to(device)
        if isinstance(model, T5EncoderModel):
            # Its embeddings are two modules with one weight, of which one never runs. One module can be sharded.
            model.set_input_embeddings(model.get_input_embeddings())
        self.tokenizer = tokenizer
        self._pools = POOLED in wanted
        positions = getattr(model.config, "max_position_embeddings", None)
        if max_tokens is not None and positions is not None and max_tokens > positions:
            raise MobiusError(
                f"max_text_tokens={max_tokens} is more than the text encoder's {positions} positions"
                f" ({model.config.name_or_path}): lower max_text_tokens"
            )
        limits = [n for n in (tokenizer.model_max_length, positions) if n is not None and n < 100_000]
        if max_tokens is None and not limits:
            raise MobiusError(
                f"neither the text encoder nor its tokenizer ({model.config.name_or_path}) has a maximum number of"
                " tokens: set max_text_tokens"
            )
        self.max_tokens = max_tokens or min(limits)

    @property
    def device(self) -> torch.device:
        """The model's current device."""
        return self.model.device

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    @property
    def encoders(self) -> Mapping[str, TextEncoder]:
        """See TextEncoding."""
        return {PART: self}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See TextEncoding."""
        return {TEXT: (self.max_tokens, self.width)} | ({POOLED: (self.width,)} if self._pools else {})

    def identity(self) -> dict[str, str]:
        """See TextEncoding."""
        identity = {
            "text encoder": weights_hash(self.model),
            "text tokens": str(self.max_tokens),
            "padding masked": str(masks_padding(self.model)),
        }
        return identity | ({"pooled text": "mean of the tokens"} if self._pools else {})

    def encode(self, caption: str, where: str = "") -> Conditions:
        """See TextEncoding."""
        return self.embed(self.tokenize(caption, where))

    def tokenize(self, caption: str, where: str = "") -> Tokens:
        """Tokenize one caption. Truncates a caption that is too long, with a warning.

        Args:
            where: name of the clip in the warning.
        """
        tokens = self.tokenizer(
            caption, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        if int(tokens.attention_mask.sum()) == self.max_tokens:
            self._warn_if_truncated(caption, where)
        return Tokens(tokens.input_ids, tokens.attention_mask)

    @torch.no_grad()
    def embed(self, tokens: Tokens) -> Conditions:
        """Encode one tokenized caption."""
        mask = tokens.mask.to(self.device)
        states = self.run(tokens, masked=masks_padding(self.model)).last_hidden_state[0]
        pooled = {}
        if self._pools:
            weight = mask[0].to(states.dtype)
            pooled[POOLED] = weight @ states / weight.sum()
        return Conditions({TEXT: states} | pooled).to(dtype=torch.float32)

    @torch.no_grad()
    def run(self, tokens: Tokens, masked: bool = False, **options: Any) -> Any:
        """The model's output for one tokenized caption.

        Args:
            masked: no token attends to padding.
            options: of the model's forward pass.
        """
        mask = tokens.mask.to(self.device) if masked else None
        return self.model(tokens.ids.to(self.device), attention_mask=mask, **options)

    def _warn_if_truncated(self, caption: str, where: str) -> None:
        whole = self.tokenizer(caption, return_offsets_mapping=self.tokenizer.is_fast, verbose=False)
        if len(whole.input_ids) <= self.max_tokens:
            return
        special = self.tokenizer.num_special_tokens_to_add()
        kept = caption
        if self.tokenizer.is_fast:
            kept = caption[: whole.offset_mapping[self.max_tokens - special][1]]
        logger.warning(
            "%sa prompt of %d tokens is truncated to %d, after %r: %r",
            f"{where}: " if where else "",
            len(whole.input_ids),
            self.max_tokens,
            kept[-30:],
            caption,
        )


def masks_padding(model: PreTrainedModel) -> bool:
    """True if padding tokens are masked in attention.

    Stable Diffusion was trained on CLIP embeddings without masking. As in diffusers' pipelines, use_attention_mask in
    the configuration overrides this. BERT-like encoders require masking.
    """
    clip = model.config.model_type in ("clip", "clip_text_model")
    return bool(getattr(model.config, "use_attention_mask", not clip))


def text_model_class(config: Any) -> type[Any]:
    """The class that loads or makes the text encoder of a transformers configuration."""
    if CLIPTextModelWithProjection.__name__ in (config.architectures or ()):
        return CLIPTextModelWithProjection
    return CLASSES.get(config.model_type, AutoModel)


def tokenizer_part(part: str) -> str:
    """The pipeline's part with the tokenizer of a text encoder: tokenizer_2 of text_encoder_2."""
    return part.replace(PART, "tokenizer")


def load_text_model(name_or_path: str, part: str = PART) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text encoder in float32, and its tokenizer.

    Args:
        name_or_path: a folder, a hub name or `package:NAME`. The folder can be a diffusers pipeline with text_encoder/
            and tokenizer/.
        part: the text encoder's part, if the folder is a pipeline.

    Raises:
        MobiusError: no text encoder can be loaded from there, or encoder and tokenizer do not fit each other.
    """
    try:
        source = resolve_package(name_or_path)
        place = find_model(source, part)
        config = load_object(AutoConfig, place)
        model = load_transformers(text_model_class(config), place, dtype=torch.float32)
        # Passing the config avoids a hub query: a pipeline's tokenizer/ has no config.json.
        folder = tokenizer_part(part)
        tokens = replace(place, subfolder=folder, folder=place.folder.parent / folder)
        tokenizer = load_object(AutoTokenizer, tokens if place.subfolder else place, config=config)
    except MobiusError as error:
        raise MobiusError(
            f"cannot load a text encoder from {name_or_path!r}: {error}. text_encoder_name_or_path can be a folder, a"
            " hub name or package:NAME"
        ) from error
    if isinstance(model, ChineseCLIPModel):
        model = model.text_model
    embeddings = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > embeddings:
        raise MobiusError(
            f"the tokenizer of {name_or_path!r} has {len(tokenizer)} tokens, but the text encoder has embeddings of"
            f" {embeddings}: remove the added tokens, or add their embeddings to the text encoder"
        )
    return model, tokenizer
