"""Resampling of frames with individual durations to a constant rate."""

from __future__ import annotations

from statistics import median_low

BROWSERS_MIN_MS = 11  # browsers show a frame of 10 ms or less for 100 ms
BROWSERS_MS = 100
MAX_FPS = 60.0


def as_browsers(durations: list[float]) -> list[float]:
    """Frame durations in ms as browsers show them, which GIF authors rely on."""
    return [duration if duration >= BROWSERS_MIN_MS else BROWSERS_MS for duration in durations]


def frame_rate(durations: list[float]) -> float:
    """The rate of the median duration (ms), in frames per second, at most 60."""
    return min(MAX_FPS, 1000.0 / median_low(durations))


def displayed_frames(durations: list[float], fps: float) -> list[int]:
    """The indices of the frames displayed in the middle of each 1/fps seconds; at least one."""
    ends: list[float] = []
    for duration in durations:
        ends.append((ends[-1] if ends else 0.0) + duration)
    count = max(1, round(ends[-1] * fps / 1000))
    frames, number = [], 0
    for tick in range(count):
        time = (tick + 0.5) * 1000 / fps
        while number < len(ends) - 1 and ends[number] <= time:
            number += 1
        frames.append(number)
    return frames
