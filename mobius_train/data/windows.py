"""Which frames of a clip are taken: evenly over its length, or in windows at a rate.

The ticks of a clip are its frames, or those on display at a constant rate (`displayed_frames`). A window of F frames
takes every stride-th tick from its start on, so it spans (F - 1)·stride + 1 ticks.

Legend: F frames of a window.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, NamedTuple

from mobius_train.data.timing import displayed_frames, evenly_spaced, frame_rate
from mobius_train.errors import MobiusError

START = Fraction(0)


def window_start(place: Fraction, ticks: int, count: int, stride: int = 1) -> int:
    """The tick at which a window of `count` frames starts.

    Args:
        place: among the possible starts, from 0 for the first to 1 for the last. Places that are drawn evenly give even
            starts.
    """
    last = ticks - (count - 1) * stride - 1
    return min(last, int(place * (last + 1)))


def window_places(frames: int, count: int, most: int | None = None) -> list[Fraction]:
    """The places of all windows that do not overlap, spread evenly from the first start to the last.

    Args:
        frames: every stride-th tick of the clip.
        most: the most windows to take.
    """
    windows = min(frames // count, most or frames)
    return [Fraction(number, max(1, windows - 1)) for number in range(windows)]


class FrameChoice(NamedTuple):
    """How the frames of a clip are chosen.

    rate: of the ticks, in frames per second; None: the file's frames. stride: see above. window: the whole clip,
    evenly; the first window; a random one for every sample; or all. most: windows of a clip, at most; for `all`.
    """

    rate: float | None = None
    stride: int = 1
    window: Literal["whole", "start", "random", "all"] = "whole"
    most: int | None = None

    def ticks(self, durations: list[float]) -> list[int]:
        """The frame numbers of the ticks, from the frames' durations in ms."""
        # A still has one frame at every rate.
        if self.rate is None or len(durations) == 1:
            return list(range(len(durations)))
        return displayed_frames(durations, self.rate)

    def available(self, ticks: int) -> int:
        """The frames that a window can have at most, in a clip of this many ticks."""
        return -(-ticks // self.stride)

    def frames(self, durations: list[float], count: int, place: Fraction = START) -> list[int]:
        """The numbers of the frames to take, in ascending order; the clip has as many as `available` says.

        Args:
            durations: of all frames, in ms.
            place: of the window; see `window_start`.
        """
        if self.window == "whole":
            return evenly_spaced(durations, count)
        ticks = self.ticks(durations)
        start = window_start(place, len(ticks), count, self.stride)
        return ticks[start :: self.stride][:count]

    def shown_rate(self, durations: list[float], count: int) -> float:
        """The frames per second of the frames that are taken."""
        if self.window == "whole":
            # A still has no length.
            return 1000 * count / max(sum(durations), 1)
        return (self.rate or frame_rate(durations)) / self.stride

    def __str__(self) -> str:
        rate = "the file's rate" if self.rate is None else f"{self.rate:g} fps"
        return f"{rate}, stride {self.stride}" if self.stride > 1 else rate

    def identity(self) -> dict[str, str]:
        """What decides which frames are taken, by name; empty for the whole clip."""
        if self.window == "whole":
            return {}
        most = "" if self.most is None else f", {self.most} at most"
        return {"frames": f"{self.rate or 'file'} fps, stride {self.stride}, window {self.window}{most}"}

    def too_short(self, name: str, frames: int, count: int, what: str = "a clip is") -> MobiusError:
        """The error for a clip, or the first of several, that is shorter than a window.

        Args:
            frames: that the clip has at this rate and stride.
        """
        return MobiusError(
            f"{what} shorter than a window of {count} frames at {self}: {name} has {frames}. Remove what is too short,"
            " lower data.num_frames or data.frame_stride, or raise data.frame_rate"
        )


WHOLE = FrameChoice()
