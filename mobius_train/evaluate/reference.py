"""Reference clips: real clips beside which evaluated ones are judged."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mobius_train.data.buckets import Shape
from mobius_train.evaluate.clips import Clips, EvaluatedClip


class Reference:
    """Reference clips by caption, and as a set. Where several have a caption, the first one counts.

    Reference clips are read in the shape of the clips that they are compared with, as in training: evenly spaced
    frames, scaled and centre-cropped. Clips with fewer frames are left out.
    """

    def __init__(self, clips: Clips) -> None:
        self.clips = clips
        self._by_caption: dict[str, int] = {}
        for number, entry in enumerate(clips.entries):
            for caption in entry.captions:
                self._by_caption.setdefault(caption.text, number)

    def beside(self, clip: EvaluatedClip) -> EvaluatedClip:
        """The clip with the frames of its reference clip, if there is one that is long enough."""
        number = self._by_caption.get(clip.caption)
        if number is None or self.clips.shapes[number].num_frames < len(clip.frames):
            return clip
        return clip._replace(reference=self.clips.frames(number, clip.shape))

    def long_enough(self, num_frames: int) -> list[int]:
        """The numbers of the clips with so many frames."""
        return [number for number, shape in enumerate(self.clips.shapes) if shape.num_frames >= num_frames]

    def in_shape(self, shape: Shape) -> Iterator[tuple[str, Tensor]]:
        """Key and frames of every clip that is long enough, in one shape."""
        for number in self.long_enough(shape.num_frames):
            yield self.clips.entries[number].key, self.clips.frames(number, shape)
