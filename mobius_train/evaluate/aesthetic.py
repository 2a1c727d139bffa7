"""Aesthetic quality: LAION's linear head on CLIP's image embedding, as in VBench."""

from __future__ import annotations

from pathlib import Path

from mobius_train.errors import MobiusError
from mobius_train.evaluate.clips import EvaluatedClip
from mobius_train.evaluate.dimension import Dimension
from mobius_train.evaluate.frame_encoders import ClipEncoder
from mobius_train.prepare.stages.aesthetic import read_head


class AestheticQuality(Dimension):
    """
    Raises:
        MobiusError: the file is no linear head, or its width is not the encoder's.
    """

    name = "aesthetic_quality"
    meaning = "mean over frames of LAION's aesthetic score, 1 to 10, divided by 10"
    better = "higher"

    def __init__(self, encoder: ClipEncoder, head: Path) -> None:
        self._encoder = encoder
        self._weight, self._bias = read_head(head)
        if self._weight.shape[1] != encoder.width:
            raise MobiusError(
                f"{head} expects embeddings of width {self._weight.shape[1]}, but CLIP's have {encoder.width}: give the"
                " CLIP that belongs to the head with --aesthetic-clip (ViT-L/14 for VBench's)"
            )

    def measure(self, clip: EvaluatedClip) -> float:
        return float((self._encoder.embed(clip.frames) @ self._weight.T + self._bias).mean()) / 10
