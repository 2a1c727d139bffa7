"""Static filtering: drops clips in which too many frames hardly differ from the previous one."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages.stage import ClipStage


class Static(ClipStage):
    """A frame is static if its grey levels differ from the previous frame's by less than `difference` on average."""

    name: Literal["static"]
    difference: float = Field(0.9, ge=0, description="mean difference of grey levels, of 255")
    max_share: float = Field(0.3, ge=0, le=1, description="largest share of static frames")

    def process(self, clip: Candidate) -> None:
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.int16) for frame in clip.pixels]
        steps = [float(np.abs(after - before).mean()) for before, after in pairwise(grey)]
        if not steps:
            raise Dropped("still")
        share = sum(step < self.difference for step in steps) / len(steps)
        clip.scores[self.name] = {"share": round(share, 4), "difference": round(float(np.mean(steps)), 4)}
        if share > self.max_share:
            raise Dropped("static", f"{share:.0%} of its frames")
