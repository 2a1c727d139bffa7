"""Dimensions of the pixels alone: flicker, the order of the frames, and motion next to a reference clip."""

from __future__ import annotations

from mobius_train.evaluate.clips import EvaluatedClip
from mobius_train.evaluate.dimension import Dimension, Unmeasured
from mobius_train.metrics.motion import frame_difference, frame_order, motion_correlation


class TemporalFlickering(Dimension):
    """VBench's formula. VBench applies it only to prompts and clips that are static."""

    name = "temporal_flickering"
    meaning = "1 - mean |change| of adjacent frames / 255"
    better = "higher"
    best_for_stills = True
    shuffled_control = True

    def measure(self, clip: EvaluatedClip) -> float:
        return 1 - frame_difference(clip.frames) / 255


class Order(Dimension):
    name = "order"
    meaning = "squared change of adjacent frames over that of all pairs; 1 for frames without order"
    better = "lower"
    shuffled_control = True

    def measure(self, clip: EvaluatedClip) -> float:
        order = frame_order(clip.frames)
        if order is None:
            raise Unmeasured("all frames are equal")
        return order


class MotionCorrelation(Dimension):
    name = "motion_correlation"
    meaning = "cosine of the clip's and the reference clip's deviations from their mean frames, for equal captions"
    better = "higher"
    shuffled_control = True

    def measure(self, clip: EvaluatedClip) -> float:
        if clip.reference is None:
            raise Unmeasured("no reference clip with this caption and enough frames")
        return motion_correlation(clip.frames, clip.reference)
