"""Agreement of a clip with its caption, frame by frame."""

from __future__ import annotations

from mobius_train.evaluate.clips import EvaluatedClip
from mobius_train.evaluate.dimension import Dimension
from mobius_train.evaluate.frame_encoders import CaptionEncoder, ClipEncoder


class TextAlignment(Dimension):
    """The CLIP score without its factor (https://arxiv.org/abs/2104.08718). It does not see the order of frames."""

    name = "text_alignment"
    meaning = "mean cosine of CLIP's embeddings of the frames and of the caption"
    better = "higher"

    def __init__(self, frames: ClipEncoder, captions: CaptionEncoder) -> None:
        self._frames, self._captions = frames, captions

    def measure(self, clip: EvaluatedClip) -> float:
        return float((self._frames.embed(clip.frames) @ self._captions.embed(clip.caption)).mean())
