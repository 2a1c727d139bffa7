"""One evaluation: every clip in every dimension, and the distances of the set to the reference.

Legend: F frames, H, W pixels, N clips, D width of the features.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mobius_train.bars import progress
from mobius_train.data.buckets import Shape
from mobius_train.errors import MobiusError
from mobius_train.evaluate.choose_dimensions import Chosen
from mobius_train.evaluate.clips import EvaluatedClip
from mobius_train.evaluate.dimension import Dimension, Unmeasured
from mobius_train.evaluate.frechet import controls, frechet_distance
from mobius_train.evaluate.reference import Reference
from mobius_train.evaluate.report import ClipResult, DimensionResult, DistanceResult
from mobius_train.evaluate.set_features import SetFeatures
from mobius_train.evaluate.shuffle import shuffled

FEWEST = 4  # clips on each side of a distance: two in each half of the reference


@dataclass
class _Values:
    """Values of one dimension over clips; weights: of the mean."""

    values: list[float] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    shuffled: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


class Evaluation:
    """Measures clips one by one, so that only one is in memory.

    Attributes:
        clips: results of the clips so far.
        features: by name, features (D,) of every clip so far.
    """

    def __init__(self, chosen: Chosen, reference: Reference | None, set_features: Sequence[SetFeatures]) -> None:
        self._chosen, self._reference, self._set_features = chosen, reference, set_features
        self._values: dict[str, _Values] = defaultdict(_Values)
        self.clips: list[ClipResult] = []
        self.features: dict[str, list[Tensor]] = defaultdict(list)
        self._shape: Shape | None = None

    def measure(self, clips: Iterable[EvaluatedClip], total: int) -> None:
        """Measure clips.

        Raises:
            MobiusError: a clip cannot be decoded.
        """
        for clip in progress(clips, total=total, desc="evaluating", unit="clip"):
            self._measure(clip if self._reference is None else self._reference.beside(clip))

    def _measure(self, clip: EvaluatedClip) -> None:
        frames, width, height = self._shape = clip.shape
        result = ClipResult(key=clip.key, caption=clip.caption, frames=frames, width=width, height=height, fps=clip.fps)
        control = clip._replace(frames=shuffled(clip.frames, clip.key))
        for dimension in self._chosen.dimensions:
            recorded = self._values[dimension.name]
            try:
                value = dimension.measure(clip)
            except Unmeasured as reason:
                result.unmeasured[dimension.name] = str(reason)
                recorded.reasons[str(reason)] += 1
                continue
            result.values[dimension.name] = value
            recorded.values.append(value)
            recorded.weights.append(frames - 1 if dimension.weighs_transitions else 1)
            if dimension.shuffled_control:
                recorded.shuffled.append(dimension.measure(control))
        for features in self._set_features:
            self.features[features.name].append(features.of(clip.frames))
        self.clips.append(result)

    def dimensions(self) -> dict[str, DimensionResult]:
        """The results over all clips so far, by name."""
        measured = {d.name: _result(d, self._values[d.name]) for d in self._chosen.dimensions}
        return measured | {name: DimensionResult(needs=needs) for name, needs in self._chosen.needs.items()}

    def distances(self) -> dict[str, DistanceResult]:
        """Distances to the reference, by name of the features. The clips have one shape."""
        return {features.name: self._distance(features) for features in self._set_features}

    def _distance(self, features: SetFeatures) -> DistanceResult:
        assert self._reference is not None
        assert self._shape is not None
        ours = torch.stack(self.features[features.name])
        count = len(self._reference.long_enough(self._shape.num_frames))
        theirs, mixed = [], []
        clips = self._reference.in_shape(self._shape)
        for key, frames in progress(clips, total=count, desc=features.name, unit="clip"):
            theirs.append(features.of(frames))
            mixed.append(features.of(shuffled(frames, key)))
        real = torch.stack(theirs)
        control = controls(real, torch.stack(mixed))
        return DistanceResult(
            value=frechet_distance(ours, real),
            clips=len(ours),
            reference=len(real),
            features=real.shape[1],
            halves=control.halves,
            shuffled=control.shuffled,
            sees_order=control.shuffled > control.halves,
        )


def check_shapes(set_features: Sequence[SetFeatures], shapes: Sequence[Shape], source: str) -> None:
    """
    Raises:
        MobiusError: a distance is wanted, and the clips have several shapes.
    """
    if set_features and len(set(shapes)) > 1:
        several = ", ".join(sorted(str(shape) for shape in set(shapes))[:3])
        raise MobiusError(
            f"{_names(set_features)} need clips of one shape, but {source} has {len(set(shapes))} (frames x width x"
            f" height: {several} …). Choose with --only, or give one size with --resolution"
        )


def check_sets(
    set_features: Sequence[SetFeatures], num_frames: int, count: int, source: str, reference: Reference | None
) -> None:
    """Refuse sets whose distance is not defined, before the first clip is decoded.

    Args:
        num_frames, count: of the evaluated clips.

    Raises:
        MobiusError: there is no reference, a set is too small, or the clips are too short for an encoder.
    """
    if not set_features:
        return
    if reference is None:
        raise MobiusError(f"{_names(set_features)} compare the clips with others: add --reference CLIPS")
    for features in set_features:
        features.check(num_frames, source)
    real = len(reference.long_enough(num_frames))
    for name, clips in ((source, count), (f"{reference.clips.source} (of {num_frames} frames or more)", real)):
        if clips < FEWEST:
            raise MobiusError(f"{_names(set_features)} need {FEWEST} clips or more, but {name} has {clips}")


def _names(set_features: Sequence[SetFeatures]) -> str:
    return " and ".join(features.name for features in set_features)


def _result(dimension: Dimension, recorded: _Values) -> DimensionResult:
    result = DimensionResult(
        meaning=dimension.meaning,
        better=dimension.better,
        best_for_stills=dimension.best_for_stills,
        clips=len(recorded.values),
        unmeasured=dict(recorded.reasons),
    )
    if not recorded.values:
        return result
    weighted = zip(recorded.values, recorded.weights, strict=True)
    result.value = sum(value * weight for value, weight in weighted) / sum(recorded.weights)
    if recorded.shuffled:
        pairs = list(zip(recorded.values, recorded.shuffled, strict=True))
        result.shuffled = sum(recorded.shuffled) / len(pairs)
        sign = -1 if dimension.better == "lower" else 1
        result.ahead_of_shuffled = sum(sign * value > sign * other for value, other in pairs) / len(pairs)
    return result
