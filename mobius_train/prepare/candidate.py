"""A clip and its record as they pass through the stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobius_train.data.entry import Entry
from mobius_train.errors import MobiusError

Frames = NDArray[np.uint8]  # (F, H, W, 3), RGB


class Drop(NamedTuple):
    """Why a clip was dropped. reason: a short text, counted over clips. detail: this clip's own numbers."""

    stage: str
    reason: str
    detail: str = ""


class Dropped(Exception):
    """Raised by a stage to drop a clip."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, str(detail)


@dataclass
class Candidate:
    """A clip in preparation.

    key: unique, with characters that are valid in shards. origin: its location in messages. group: clips of one group
    stay on one side of the split. number: the index of its reference in the part. captions: by language. drafts:
    descriptions from which a caption is made. start, end: in seconds of the file. frames: at the constant rate `fps`;
    None before decoding. place: the location of its bytes.
    """

    key: str
    origin: str
    group: str
    number: int = 0
    captions: dict[str, str] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    drafts: list[str] = field(default_factory=list)
    output: dict[str, Any] = field(default_factory=dict)
    dropped: Drop | None = None
    frames: Frames | None = None
    place: Entry | None = None

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return 0 if self.place is None else self.place.size

    def read(self) -> bytes:
        """Read the file.

        Raises:
            Dropped: the file can no longer be read.
        """
        assert self.place is not None, f"{self.key} has no place"
        try:
            return self.place.read_any()
        except MobiusError as error:
            raise Dropped("unreadable", error) from error

    @property
    def pixels(self) -> Frames:
        """The frames of a decoded clip. Recipe validation puts decode before every stage that needs them."""
        assert self.frames is not None, f"{self.key} is not decoded"
        return self.frames

    def row(self) -> dict[str, Any]:
        """The clip's line in the index: all fields except the frames."""
        return {
            "key": self.key,
            "origin": self.origin,
            "kept": self.dropped is None,
            "stage": self.dropped and self.dropped.stage,
            "reason": self.dropped and self.dropped.reason,
            "detail": self.dropped and self.dropped.detail,
            "captions": self.captions,
            "drafts": self.drafts,
            "labels": self.labels,
            "group": self.group,
            "notes": self.notes,
            "scores": self.scores,
            "start": self.start,
            "end": self.end,
            "fps": self.fps,
            "sha256": self.sha256,
            "output": self.output,
            "number": self.number,
        }

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Candidate:
        """Restore a clip from its row, without frames."""
        row = dict(row)
        kept, *why = (row.pop(name) for name in ("kept", "stage", "reason", "detail"))
        return cls(**row, dropped=None if kept else Drop(*why))
