"""Resolution and aspect buckets: every clip gets one of a few sizes, so that clips can be batched."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from mobius_train.data.buckets import Shape, best_bucket, enlargement
from mobius_train.data.decode import crop_to_size
from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages.stage import ClipStage

Side = Annotated[int, Field(ge=8, multiple_of=8)]  # autoencoders reduce by 8


class Buckets(ClipStage):
    """Applies the bucket rule of training, and drops clips that would be enlarged by more than `max_enlarging`.

    Frames are scaled to cover their bucket and centre-cropped.
    """

    name: Literal["buckets"]
    sizes: tuple[tuple[Side, Side], ...] = Field(min_length=1, description="[width, height], both multiples of 8")
    max_enlarging: float = Field(1.0, gt=0)
    max_cut: float = Field(0.5, ge=0, lt=1, description="largest share of the picture that may be cut off")

    def process(self, clip: Candidate) -> None:
        count, height, width = clip.pixels.shape[:3]
        shape = Shape(count, width, height)
        best = best_bucket(shape, [Shape(count, *size) for size in self.sizes], self.max_enlarging)
        assert best is not None, "every size has as many frames as the clip"
        scale = enlargement(shape, best)
        if scale > self.max_enlarging:
            raise Dropped("too small", f"{width}x{height}")
        cut = 1 - best.width * best.height / (width * height * scale * scale)
        clip.scores[self.name] = {"size": [best.width, best.height], "cut": round(cut, 4)}
        if cut > self.max_cut:
            raise Dropped("aspect", f"{width}x{height} would lose {cut:.0%}")
        if shape != best:
            frames = [crop_to_size(Image.fromarray(frame), (best.width, best.height)) for frame in clip.pixels]
            clip.frames = np.stack([np.asarray(frame) for frame in frames])
