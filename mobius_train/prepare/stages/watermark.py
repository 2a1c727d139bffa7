"""Watermark filtering with an image classifier."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from mobius_train.errors import MobiusError
from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages import model_files as models
from mobius_train.prepare.stages.stage import ClipStage

KINDS = ("AutoImageProcessor", "AutoModelForImageClassification")


class Watermark(ClipStage):
    """Drops clips whose mean probability of `label` over `frames` is above `maximum`."""

    name: Literal["watermark"]
    model: str
    label: str = Field("watermark", description="name of the classifier's class")
    maximum: float = Field(0.5, ge=0, le=1)
    frames: int = Field(3, ge=1)

    def check(self) -> None:
        models.check(self.model, *KINDS)
        labels = models.read(KINDS[1], self.model).config.label2id
        if self.label not in labels:
            raise MobiusError(f"{self.model} has no class {self.label!r}; its classes are {', '.join(labels)}")

    @torch.no_grad()
    def process(self, clip: Candidate) -> None:
        processor, model = (models.load(kind, self.model) for kind in KINDS)
        inputs = processor(images=models.images(clip.pixels, self.frames), return_tensors="pt")
        shares = model(**inputs.to(models.device())).logits.float().softmax(-1)
        probability = float(shares[:, model.config.label2id[self.label]].mean())
        clip.scores[self.name] = {"probability": round(probability, 4)}
        if probability > self.maximum:
            raise Dropped("watermark", f"{probability:.2f}")
