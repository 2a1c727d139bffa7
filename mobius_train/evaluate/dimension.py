"""What a dimension of the evaluation is: one number for a clip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from mobius_train.evaluate.clips import EvaluatedClip

Better = Literal["higher", "lower", "neither"]


class Unmeasured(Exception):
    """A clip has no value of a dimension. The text is the reason, which clips share."""


class Dimension(ABC):
    """A figure of a clip; the figure of a set of clips is the mean.

    Attributes:
        name: unique in a report. A name of VBench is given only to what equals VBench's code.
        meaning: one sentence for readers of the report.
        better: the direction of a better clip.
        shuffled_control: measure each clip a second time with shuffled frames.
        best_for_stills: a clip without motion has the best value, so the dynamic degree is shown beside it.
        weighs_transitions: the mean over clips weighs a clip of F frames by F - 1, as VBench does in some dimensions.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    better: ClassVar[Better]
    shuffled_control: ClassVar[bool] = False
    best_for_stills: ClassVar[bool] = False
    weighs_transitions: ClassVar[bool] = False

    @abstractmethod
    def measure(self, clip: EvaluatedClip) -> float:
        """The figure of one clip.

        Raises:
            Unmeasured: it is not defined for this clip.
        """
