"""Event stitching: joins consecutive shots of the same event into one clip."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from mobius_train.prepare.candidate import Candidate
from mobius_train.prepare.stages import model_files as models
from mobius_train.prepare.stages.stage import Stage


class Stitch(Stage):
    """Joins adjacent shots if the CLIP similarity of the last frame and the next first frame is above `above`.

    Shots are not adjacent if a shot between them was dropped.
    """

    name: Literal["stitch"]
    model: str
    above: float = Field(0.6, ge=-1, le=1)

    def check(self) -> None:
        models.check(self.model, *models.VISION)

    def apply(self, clips: list[Candidate]) -> list[Candidate]:
        joined: list[Candidate] = []
        for clip in clips:
            before = joined[-1] if joined else None
            if before is None or before.dropped or clip.dropped or not self._similar(before, clip):
                joined.append(clip)
                continue
            before.frames, before.end = np.concatenate([before.pixels, clip.pixels]), clip.end
            before.scores.setdefault(self.name, {"joined": 1})["joined"] += 1
        return joined

    def _similar(self, before: Candidate, after: Candidate) -> bool:
        if before.end != after.start or before.pixels.shape[1:] != after.pixels.shape[1:]:
            return False
        edges = [Image.fromarray(before.pixels[-1]), Image.fromarray(after.pixels[0])]
        left, right = models.embeddings(self.model, edges)
        similarity = float(left @ right)
        after.scores[self.name] = {"similarity": round(similarity, 4)}
        return similarity > self.above
