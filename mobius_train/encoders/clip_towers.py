"""The text of Stable Diffusion XL and 3: several CLIP text encoders side by side, and T5.

Legend: L text tokens, D width of the text, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.encoders.text_encoder import TextEncoder
from mobius_train.errors import MobiusError
from mobius_train.models import weights_hash

T5_PART = "text_encoder_3"
# Tokens of T5, as in diffusers' StableDiffusion3Pipeline.
T5_TOKENS = 256


class ClipTowers:
    """CLIP text encoders side by side; see TextEncoding.

        text    (L, D): the penultimate hidden states of all encoders, one beside the other
        pooled  (P,): the projected texts of the encoders that have a projection, one behind the other

    Args:
        encoders: by part; at least one with a projection. All have the same number of tokens.
    """

    def __init__(self, encoders: Mapping[str, TextEncoder]) -> None:
        self.encoders = encoders
        (self.max_tokens,) = {encoder.max_tokens for encoder in encoders.values()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See TextEncoding."""
        models = [encoder.model for encoder in self.encoders.values()]
        pooled = sum(int(model.config.projection_dim) for model in models if has_projection(model))
        return {TEXT: (self.max_tokens, sum(encoder.width for encoder in self.encoders.values())), POOLED: (pooled,)}

    def identity(self) -> dict[str, str]:
        """See TextEncoding."""
        hashes = {part: weights_hash(encoder.model) for part, encoder in self.encoders.items()}
        return hashes | {"text tokens": str(self.max_tokens)}

    def encode(self, caption: str, where: str = "") -> Conditions:
        """See TextEncoding."""
        hidden: list[Tensor] = []
        projected: list[Tensor] = []
        for part, encoder in self.encoders.items():
            # As in diffusers, padding is not masked, whatever the configuration says.
            output = encoder.run(encoder.tokenize(caption, of_part(where, part)), output_hidden_states=True)
            hidden.append(output.hidden_states[-2][0])
            if has_projection(encoder.model):
                projected.append(output.text_embeds[0])
        return Conditions({TEXT: torch.cat(hidden, dim=-1), POOLED: torch.cat(projected)}).to(dtype=torch.float32)


class XlText(ClipTowers):
    """The text of Stable Diffusion XL: CLIP-L, and CLIP-G with its projection; see ClipTowers.

    The empty caption is zeros, with which XL was trained: diffusers' `force_zeros_for_empty_prompt`.
    """

    def encode(self, caption: str, where: str = "") -> Conditions:
        """See TextEncoding."""
        if caption:
            return super().encode(caption, where)
        device = next(iter(self.encoders.values())).device
        return Conditions({name: torch.zeros(shape, device=device) for name, shape in self.shapes().items()})


class Sd3Text:
    """The text of Stable Diffusion 3: two CLIP text encoders with projections, then the tokens of T5.

        text    (L, D): the text of the CLIP encoders, filled up with zeros to T5's width; then T5's last hidden states
        pooled  (P,): as in ClipTowers

    Args:
        clips: text_encoder and text_encoder_2.
        t5: text_encoder_3; None: its tokens are zeros, as in diffusers.
        width: D.
        t5_tokens: the number of T5's tokens, with or without T5.

    Raises:
        MobiusError: T5's hidden states are not of this width, or the CLIP encoders' are wider.
    """

    def __init__(self, clips: ClipTowers, t5: TextEncoder | None, width: int, t5_tokens: int = T5_TOKENS) -> None:
        if t5 is not None and t5.width != width:
            raise MobiusError(f"{T5_PART} has hidden states of {t5.width}, but the image model takes a text of {width}")
        self._clips, self._t5, self._width, self.max_tokens = clips, t5, width, t5_tokens
        self._missing = width - clips.shapes()[TEXT][1]
        if self._missing < 0:
            raise MobiusError(
                f"{' and '.join(clips.encoders)} have together hidden states of {width - self._missing}, but the image"
                f" model takes a text of {width}: choose matching text encoders"
            )

    @property
    def encoders(self) -> Mapping[str, TextEncoder]:
        """See TextEncoding."""
        return {**self._clips.encoders} | ({} if self._t5 is None else {T5_PART: self._t5})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See TextEncoding."""
        return self._clips.shapes() | {TEXT: (self._clips.max_tokens + self.max_tokens, self._width)}

    def identity(self) -> dict[str, str]:
        """See TextEncoding."""
        t5 = "none" if self._t5 is None else weights_hash(self._t5.model)
        return self._clips.identity() | {T5_PART: t5, "T5's tokens": str(self.max_tokens), "width": str(self._width)}

    def encode(self, caption: str, where: str = "") -> Conditions:
        """See TextEncoding."""
        clips = self._clips.encode(caption, where)
        filled = nn.functional.pad(clips[TEXT], (0, self._missing))
        if self._t5 is None:
            last = filled.new_zeros(self.max_tokens, self._width)
        else:
            # As in diffusers, and so in the model's training, padding is not masked.
            last = self._t5.run(self._t5.tokenize(caption, of_part(where, T5_PART))).last_hidden_state[0]
        return clips | Conditions({TEXT: torch.cat([filled, last.float()])})


def has_projection(model: nn.Module) -> bool:
    """The model is a CLIP text encoder that projects the whole text to a vector."""
    return isinstance(model, CLIPTextModelWithProjection)


def of_part(where: str, part: str) -> str:
    """The clip's name, and which of its text encoders warns."""
    return f"{where}, {part}" if where else part
