"""The interface of one or several text encoders that encode captions together.

Legend: L text tokens, D width of the text, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mobius_train.conditions import Conditions
from mobius_train.encoders.text_encoder import TextEncoder, tokenizer_part


class TextEncoding(Protocol):
    """From a caption to its conditions: `text`, and `pooled` for the backbones that need it."""

    @property
    def encoders(self) -> Mapping[str, TextEncoder]:
        """The text encoders by the name of their part in a pipeline: text_encoder, text_encoder_2, text_encoder_3."""

    @property
    def max_tokens(self) -> int:
        """The value of the recipe's `max_text_tokens` with which captions are encoded in the same way."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each condition of one caption, by name: text (L, D), pooled (P,)."""

    def identity(self) -> dict[str, str]:
        """Everything except the caption on which a condition depends, by name."""

    def encode(self, caption: str, where: str = "") -> Conditions:
        """Encode one caption, in float32. Truncates a caption that is too long, with a warning of each encoder.

        Captions are not batched, so that cached embeddings are bit-identical to online ones.

        Args:
            where: name of the clip in the warning.
        """


def components_of(text: TextEncoding) -> dict[str, Any]:
    """The text encoders and tokenizers by the names of their parts in a pipeline."""
    models = {part: encoder.model for part, encoder in text.encoders.items()}
    return models | {tokenizer_part(part): encoder.tokenizer for part, encoder in text.encoders.items()}
