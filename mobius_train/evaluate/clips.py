"""Clips as they are evaluated: all frames, at their own size, with their frame rate.

Legend: F frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor

from mobius_train.data.buckets import Shape
from mobius_train.data.clips import open_clips
from mobius_train.data.decode import decode_clip, frame_durations
from mobius_train.data.entry import Entry
from mobius_train.errors import MobiusError


class EvaluatedClip(NamedTuple):
    """frames: (F, 3, H, W) uint8 with F > 1. fps: frames per second. reference: the frames, of the same shape, of the
    reference clip with the same caption; None if there is none."""

    key: str
    caption: str
    frames: Tensor
    fps: float
    reference: Tensor | None = None

    @property
    def shape(self) -> Shape:
        return Shape(len(self.frames), self.frames.shape[3], self.frames.shape[2])


class Clips:
    """The clips of a folder or of shards.

    Args:
        source: a folder, a path, a glob or braces, as `data.train` of a recipe.
        only: patterns of keys, as in a shell; empty for all clips.
        resolution: side in pixels of the square to which `read` scales and crops; None keeps each clip's own size.

    Attributes:
        entries: the chosen clips.
        shapes: the shape to which `read` decodes each of them.

    Raises:
        MobiusError: the source cannot be opened, or a pattern matches no clip.
    """

    def __init__(self, source: str, only: Sequence[str] = (), resolution: int | None = None) -> None:
        self.source = source
        dataset = open_clips(source, num_frames=1, resolution=resolution or 1)
        chosen = _choose(dataset.keys, only, source)
        shapes = dataset.measure(0, 1)
        self.entries = [dataset.entries[number] for number in chosen]
        self.shapes = [shapes[number] for number in chosen]
        if resolution is not None:
            self.shapes = [Shape(shape.num_frames, resolution, resolution) for shape in self.shapes]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[EvaluatedClip]:
        return (self.read(number) for number in range(len(self)))

    def refuse_stills(self) -> None:
        """
        Raises:
            MobiusError: a clip has one frame.
        """
        stills = [entry.name for entry, shape in zip(self.entries, self.shapes, strict=True) if shape.num_frames < 2]
        if stills:
            raise MobiusError(
                f"{len(stills)} of {len(self)} clips of {self.source} are stills; the first is {stills[0]}. Motion and"
                " consistency are defined for two frames or more: leave the stills out, or name the others with --only"
            )

    def read(self, number: int) -> EvaluatedClip:
        """Decode all frames of a clip.

        Raises:
            MobiusError: the clip is damaged or too large.
        """
        entry = self.entries[number]
        frames = self.frames(number, self.shapes[number])
        return EvaluatedClip(entry.key, entry.captions[0].text, frames, _frames_per_second(entry))

    def frames(self, number: int, shape: Shape) -> Tensor:
        """Decode a clip to a shape: evenly spaced frames, scaled and centre-cropped, as in training.

        Raises:
            MobiusError: the clip has fewer frames, is damaged or too large.
        """
        entry = self.entries[number]
        size = (shape.width, shape.height)
        return decode_clip(entry.read(), entry.suffix, entry.name, num_frames=shape.num_frames, resolution=size)


def _choose(keys: Sequence[str], only: Sequence[str], source: str) -> list[int]:
    """The numbers of the keys that match one of the patterns; all without patterns."""
    for pattern in only:
        if not any(fnmatchcase(key, pattern) for key in keys):
            raise MobiusError(f"--only {pattern} matches none of the {len(keys)} clips of {source}, such as {keys[0]}")
    return [number for number, key in enumerate(keys) if not only or any(fnmatchcase(key, p) for p in only)]


def _frames_per_second(entry: Entry) -> float:
    """The rate at which the clip's frames, taken evenly over its length, are shown."""
    durations = frame_durations(entry.read(), entry.suffix, entry.name)
    return 1000 * len(durations) / sum(durations)
