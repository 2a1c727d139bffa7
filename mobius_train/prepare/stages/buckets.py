"""Resolution and aspect buckets: every clip gets one of a few sizes, so that batches can be made."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from mobius_train.prepare.candidate import Candidate, Dropped
from mobius_train.prepare.stages.stage import ClipStage

Side = Annotated[int, Field(ge=8, multiple_of=8)]  # what autoencoders scale down


class Buckets(ClipStage):
    """Of the sizes that need no more enlarging than `max_enlarging`, the largest of those whose aspect is nearest.

    Frames are scaled to cover it, and their centre is cut out.
    """

    name: Literal["buckets"]
    sizes: tuple[tuple[Side, Side], ...] = Field(min_length=1, description="[width, height], both multiples of 8")
    max_enlarging: float = Field(1.0, gt=0)
    max_cut: float = Field(0.5, ge=0, lt=1, description="share of the picture that may be cut off")

    def process(self, clip: Candidate) -> None:
        height, width = clip.pixels.shape[1:3]
        fitting = [size for size in self.sizes if max(size[0] / width, size[1] / height) <= self.max_enlarging]
        if not fitting:
            raise Dropped("too small", f"{width}x{height}")
        aspect = math.log(width / height)
        best = min(fitting, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1]))
        scale = max(best[0] / width, best[1] / height)
        cut = 1 - best[0] * best[1] / (width * height * scale * scale)
        clip.scores[self.name] = {"size": list(best), "cut": round(cut, 4)}
        if cut > self.max_cut:
            raise Dropped("aspect", f"{width}x{height} would lose {cut:.0%}")
        if (width, height) != best:
            clip.frames = np.stack([_covered(Image.fromarray(frame), best) for frame in clip.pixels])


def _covered(image: Image.Image, size: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The centre of this aspect, at this size."""
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = size[0] / scale, size[1] / scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height)))
