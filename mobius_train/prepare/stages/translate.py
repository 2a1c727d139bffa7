"""Translation of captions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from mobius_train.errors import MobiusError
from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages import model_files as models
from mobius_train.prepare.stages.stage import ClipStage


class Translate(ClipStage):
    """A sequence-to-sequence model (Marian, NLLB, T5) translates captions[`source`] to captions[`to`]."""

    name: Literal["translate"]
    model: str
    source: str = "en"
    to: str = "zh"
    prefix: str = ""
    first_token: str | None = Field(None, description="first token of the output, such as NLLB's zho_Hans")
    max_new_tokens: int = Field(128, ge=1)
    needs_frames: ClassVar[bool] = False

    def check(self) -> None:
        models.check(self.model, *models.REWRITING)
        unknown = (None, models.read("AutoTokenizer", self.model).unk_token_id)
        if self.first_token is not None and self._first() in unknown:
            raise MobiusError(f"first_token {self.first_token!r} is not in the vocabulary of {self.model}'s tokenizer")

    def process(self, clip: Candidate) -> None:
        if self.to in clip.captions:
            return
        if self.source not in clip.captions:
            raise Dropped("no caption", f"none in {self.source} to translate")
        options = {} if self.first_token is None else {"forced_bos_token_id": self._first()}
        text = self.prefix + clip.captions[self.source]
        translated = models.rewrite(self.model, text, self.max_new_tokens, **options)
        if not translated:
            raise Dropped("no caption", "the translation is empty")
        clip.captions[self.to] = translated

    def _first(self) -> Any:
        return models.read("AutoTokenizer", self.model).convert_tokens_to_ids(self.first_token)
