"""Summary of several descriptions of a clip into one caption."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages import model_files as models
from mobius_train.prepare.stages.stage import ClipStage


class Summarise(ClipStage):
    """A sequence-to-sequence model summarises `prefix` and the drafts, or the caption if there are no drafts."""

    name: Literal["summarise"]
    model: str
    prefix: str = Field("", description="such as 'summarize: ' for T5")
    language: str = "en"
    max_new_tokens: int = Field(64, ge=1)
    needs_frames: ClassVar[bool] = False

    def check(self) -> None:
        models.check(self.model, *models.REWRITING)

    def process(self, clip: Candidate) -> None:
        parts = clip.drafts or [clip.captions[self.language]] if self.language in clip.captions else clip.drafts
        if not parts:
            raise Dropped("no caption", f"nothing to summarise in {self.language}")
        summary = models.rewrite(self.model, self.prefix + " ".join(parts), self.max_new_tokens)
        if not summary:
            raise Dropped("no caption", "the summary is empty")
        clip.captions[self.language] = summary
