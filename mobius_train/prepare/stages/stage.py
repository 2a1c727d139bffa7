"""Base classes of stages. A stage's fields are its options; its result depends only on them and the clip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from mobius_train.config_sections import Section
from mobius_train.prepare.candidate import Candidate, Drop, Dropped


class Stage(Section, ABC):
    """Filters or changes the clips of one source file; `name` identifies it in recipes, index and report."""

    name: str
    needs_frames: ClassVar[bool] = True

    def check(self) -> None:
        """Check the stage's requirements before the work starts.

        Raises:
            MobiusError: a model or a file is missing.
        """
        return

    @abstractmethod
    def apply(self, clips: list[Candidate]) -> list[Candidate]:
        """Process all clips of a source file in order, including dropped ones; may return more or fewer clips."""


class ClipStage(Stage):
    """Processes each clip separately."""

    def apply(self, clips: list[Candidate]) -> list[Candidate]:
        for clip in clips:
            if clip.dropped is None:
                try:
                    self.process(clip)
                except Dropped as dropped:
                    drop_clip(clip, self.name, dropped)
        return clips

    @abstractmethod
    def process(self, clip: Candidate) -> None:
        """Change the clip in place.

        Raises:
            Dropped: the clip fails the stage.
        """


class GlobalStage(Stage):
    """Decides after the clips of all parts have been measured; it ends a pass over all parts."""

    def apply(self, clips: list[Candidate]) -> list[Candidate]:
        for clip in clips:
            if clip.dropped is None:
                self.measure(clip)
        return clips

    def measure(self, clip: Candidate) -> None:
        """Store the scores that the decision needs in `clip.scores`."""

    @abstractmethod
    def decide(self, rows: Iterable[dict[str, Any]]) -> dict[str, Drop]:
        """Given the rows of all clips kept so far, in order, return the clips to drop, by key."""


def drop_clip(clip: Candidate, stage: str, dropped: Dropped) -> None:
    """Mark a clip as dropped and free its frames."""
    clip.dropped, clip.frames = Drop(stage, dropped.reason, dropped.detail), None
