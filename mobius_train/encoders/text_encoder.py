"""The frozen text encoder, which maps captions to embeddings.

CLIP (Stable Diffusion), Chinese CLIP (used in the paper) and BERT-like encoders (MiniLM) are loaded from a folder, a
hub name, or `package:NAME`, a Python package that contains a model folder.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    ChineseCLIPModel,
    ChineseCLIPTextModel,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mobius_train.conditions import TEXT, Conditions
from mobius_train.errors import MobiusError
from mobius_train.pretrained.model_names import resolve_package
from mobius_train.pretrained.strict_load import find_model, load_object, load_transformers

logger = logging.getLogger(__name__)

# A CLIP folder contains both towers or only the text tower. Chinese CLIP's text tower cannot load from a folder of the
# whole model, where the weights have other names, so the whole model is loaded and its text tower used.
CLASSES: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPTextModel,
    "clip_text_model": CLIPTextModel,
    "chinese_clip": ChineseCLIPModel,
    "chinese_clip_text_model": ChineseCLIPTextModel,
}


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    Args:
        max_tokens: the length to which captions are padded and truncated; None: the tokenizer's maximum.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        max_tokens: int | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval().to(device)
        self.tokenizer = tokenizer
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
    def widths(self) -> dict[str, int]:
        """Size of the last axis of each condition, by name; must equal the backbone's `condition_widths`."""
        return {TEXT: int(self.model.config.hidden_size)}

    def encode(self, caption: str, where: str = "") -> Conditions:
        """Encode one caption to its conditions: text, (L, D). Truncates a caption that is too long, with a warning.

        Captions are not batched, so that cached embeddings are bit-identical to online ones.

        Args:
            where: name of the clip in the warning.
        """
        tokens = self.tokenizer(
            caption, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        if int(tokens.attention_mask.sum()) == self.max_tokens:
            self._warn_if_truncated(caption, where)
        return self.embed(tokens.input_ids, tokens.attention_mask)

    @torch.no_grad()
    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Conditions:
        """Encode one tokenized caption; both arguments are (1, L)."""
        mask = attention_mask.to(self.device) if masks_padding(self.model) else None
        return Conditions.of_text(self.model(input_ids.to(self.device), attention_mask=mask).last_hidden_state[0])

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


def load_text_encoder(
    name_or_path: str, device: torch.device, max_tokens: int | None = None, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load encoder and tokenizer from a folder, a hub name or `package:NAME`.

    The folder can be a diffusers pipeline with text_encoder/ and tokenizer/.

    Raises:
        MobiusError: no text encoder can be loaded from there, or encoder and tokenizer do not fit each other.
    """
    try:
        source = resolve_package(name_or_path)
        place = find_model(source, "text_encoder")
        config = load_object(AutoConfig, place)
        model = load_transformers(CLASSES.get(config.model_type, AutoModel), place, dtype=dtype)
        # Passing the config avoids a hub query: a pipeline's tokenizer/ has no config.json.
        tokens = replace(place, subfolder="tokenizer", folder=place.folder.parent / "tokenizer")
        tokenizer = load_object(AutoTokenizer, tokens if place.subfolder else place, config=config)
    except MobiusError as error:
        raise MobiusError(
            f"cannot load a text encoder from {name_or_path!r}: {error}. text_encoder_name_or_path can be a folder, a"
            " hub name or package:NAME"
        ) from error
    if isinstance(model, ChineseCLIPModel):
        model = model.text_model
    encoder = TextEncoder(model, tokenizer, device, max_tokens)
    embeddings = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > embeddings:
        raise MobiusError(
            f"the tokenizer of {name_or_path!r} has {len(tokenizer)} tokens, but the text encoder has embeddings of"
            f" {embeddings}: remove the added tokens, or add their embeddings to the text encoder"
        )
    return encoder
