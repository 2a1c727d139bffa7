"""Consistency of a clip: how alike the embeddings of its frames are.

VBench's subject and background consistency (https://arxiv.org/abs/2311.17982): over the frames f > 0, the mean of
(max(0, cos(e_f, e_{f-1})) + max(0, cos(e_f, e_0))) / 2.

Legend: F frames, D width of an embedding.
"""

from __future__ import annotations

from torch import Tensor

from mobius_train.evaluate.clips import EvaluatedClip
from mobius_train.evaluate.dimension import Dimension
from mobius_train.evaluate.frame_encoders import FrameEncoder


def consistency(embeddings: Tensor) -> float:
    """The equation above for embeddings of length 1, (F, D) with F > 1."""
    later = embeddings[1:]
    to_previous = (later * embeddings[:-1]).sum(-1).clamp(min=0)
    to_first = (later @ embeddings[0]).clamp(min=0)
    return float((to_previous + to_first).mean() / 2)


class SubjectConsistency(Dimension):
    name = "subject_consistency"
    meaning = "cosine of DINO's embeddings of each frame and the previous and first ones"
    better = "higher"
    best_for_stills = True
    weighs_transitions = True

    def __init__(self, encoder: FrameEncoder) -> None:
        self._encoder = encoder

    def measure(self, clip: EvaluatedClip) -> float:
        return consistency(self._encoder.embed(clip.frames))


class BackgroundConsistency(SubjectConsistency):
    name = "background_consistency"
    meaning = "cosine of CLIP's embeddings of each frame and the previous and first ones"
