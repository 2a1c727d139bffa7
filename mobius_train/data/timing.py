"""The times of frames: durations, and the choice of frames by time."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from statistics import median_low

from mobius_train.data.limits import Undecodable

BROWSERS_MIN_MS = 11  # browsers show a frame of 10 ms or less for 100 ms
BROWSERS_MS = 100
MAX_FPS = 60.0
MAX_TICKS = 2**18  # a few bytes can declare years
# Containers round times: the frames of a constant rate differ by up to this, in ms.
ROUNDING_MS = 2.0


def as_browsers(durations: list[float]) -> list[float]:
    """Frame durations in ms as browsers show them, which GIF authors rely on."""
    return [duration if duration >= BROWSERS_MIN_MS else BROWSERS_MS for duration in durations]


def frame_rate(durations: list[float]) -> float:
    """The rate of the median duration above 0 (ms), in frames per second, at most 60; 1 if all are 0."""
    positive = [duration for duration in durations if duration > 0]
    return min(MAX_FPS, 1000.0 / median_low(positive or [1000.0]))


def displayed_frames(durations: list[float], fps: float) -> list[int]:
    """The indices of the frames displayed in the middle of each 1/fps seconds; at least one.

    Raises:
        Undecodable: they are more than MAX_TICKS.
    """
    count = max(1, round(sum(durations) * fps / 1000))
    if count > MAX_TICKS:
        raise Undecodable("too many frames", f"{count} at {fps:g} fps; the limit is {MAX_TICKS}")
    return _frames_at(durations, [(tick + 0.5) * 1000 / fps for tick in range(count)])


def evenly_spaced(durations: list[float], count: int) -> list[int]:
    """The indices of the frames displayed at the times i·T/count of a clip's length T, i = 0 … count - 1.

    At a constant rate these are the frames floor(i·n/count) of n.
    """
    if max(durations) - min(durations) <= ROUNDING_MS:
        return [number * len(durations) // count for number in range(count)]
    length = sum(durations)
    return _frames_at(durations, [length * number / count for number in range(count)])


def _frames_at(durations: list[float], times: list[float]) -> list[int]:
    """The frame on display at each time in ms; a frame is shown from its start until before its end."""
    ends = list(accumulate(durations))
    # The tolerance outweighs the rounding of the sums.
    return [min(len(ends) - 1, bisect_right(ends, time + 1e-6)) for time in times]
