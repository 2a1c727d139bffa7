"""What a stage is. Its fields are what a recipe may say of it; its work follows from them and the clip alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from mobius_train.config import Section
from mobius_train.prepare.candidate import Candidate, Drop, Dropped


class Stage(Section, ABC):
    """Judges or changes the clips of one source file; `name` stands for it in recipes, index and report."""

    name: str
    needs_frames: ClassVar[bool] = True

    def check(self) -> None:
        """Look at what the stage needs, before anything is done.

        Raises:
            MobiusError: a model or a file isn't there.
        """
        return

    @abstractmethod
    def apply(self, clips: list[Candidate]) -> list[Candidate]:
        """All clips of a source file, dropped ones too, in their order; more or fewer may come back."""


class ClipStage(Stage):
    """Looks at each clip by itself."""

    def apply(self, clips: list[Candidate]) -> list[Candidate]:
        for clip in clips:
            if clip.dropped is None:
                try:
                    self.process(clip)
                except Dropped as dropped:
                    drop(clip, self.name, dropped)
        return clips

    @abstractmethod
    def process(self, clip: Candidate) -> None:
        """Change the clip in place.

        Raises:
            Dropped: the clip is left out.
        """


class GlobalStage(Stage):
    """Decides once the clips of all parts have been measured; a pass over all parts ends with it."""

    def apply(self, clips: list[Candidate]) -> list[Candidate]:
        for clip in clips:
            if clip.dropped is None:
                self.measure(clip)
        return clips

    def measure(self, clip: Candidate) -> None:
        """Put into `clip.scores` what the decision needs."""

    @abstractmethod
    def decide(self, rows: Iterable[dict[str, Any]]) -> dict[str, Drop]:
        """Which of the rows of clips kept so far, in their order, are left out, by key."""


def drop(clip: Candidate, stage: str, dropped: Dropped) -> None:
    """Mark a clip as left out, and let go of its frames."""
    clip.dropped, clip.frames = Drop(stage, dropped.reason, dropped.detail), None
