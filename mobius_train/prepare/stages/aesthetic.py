"""Aesthetic score: a linear head on CLIP's image embedding (https://github.com/LAION-AI/aesthetic-predictor)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from mobius_train.errors import MobiusError
from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages import model_files as models
from mobius_train.prepare.stages.stage import ClipStage


class Aesthetic(ClipStage):
    """The mean of head(embedding) over `frames`; LAION's heads range from 1 to 10."""

    name: Literal["aesthetic"]
    model: str = Field(description="a CLIP with the head's width")
    head: Path = Field(description="weight (1, D) and bias (1,), in .safetensors or .pth (read without running code)")
    minimum: float = 4.5
    frames: int = Field(3, ge=1)

    def check(self) -> None:
        models.check(self.model, *models.VISION)
        expected = read_head(self.head)[0].shape[1]
        given = models.read(models.VISION[1], self.model).config.projection_dim
        if expected != given:
            raise MobiusError(f"{self.head} expects {expected} features, but {self.model} has {given}")

    def process(self, clip: Candidate) -> None:
        weight, bias = read_head(self.head)
        features = models.embeddings(self.model, models.images(clip.pixels, self.frames))
        score = float((features @ weight.T + bias).mean())
        clip.scores[self.name] = {"score": round(score, 3)}
        if score < self.minimum:
            raise Dropped("ugly", f"{score:.2f}")


@lru_cache(maxsize=2)
def read_head(path: Path) -> tuple[Tensor, Tensor]:
    """A linear head's weight (1, D) and bias (1,).

    Raises:
        MobiusError: the file contains none.
    """
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        return tensors["weight"].float().view(1, -1), tensors["bias"].float().view(1)
    except Exception as error:  # each format has its own errors
        raise MobiusError(f"{path} is not a linear head with weight and bias: {error}") from error
