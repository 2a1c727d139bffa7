"""Label frequency filtering: a model cannot learn a label that only a few clips have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field

from mobius_train.prepare.candidate import Drop
from mobius_train.prepare.stages.stage import GlobalStage


class LabelFrequency(GlobalStage):
    """Keeps clips with at least one label that occurs more than `more_than` times."""

    name: Literal["label_frequency"]
    more_than: int = Field(ge=0)
    needs_frames: ClassVar[bool] = False

    def decide(self, rows: Iterable[dict[str, Any]]) -> dict[str, Drop]:
        labels = {row["key"]: set(row["labels"]) for row in rows}
        counts = Counter(label for own in labels.values() for label in own)
        best = {key: max((counts[label] for label in own), default=0) for key, own in labels.items()}
        return {
            key: Drop(self.name, "rare label" if labels[key] else "no label", f"{count} clips")
            for key, count in best.items()
            if count <= self.more_than
        }
