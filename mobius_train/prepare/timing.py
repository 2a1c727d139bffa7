"""From frames with times of their own to a constant rate."""

from __future__ import annotations

from statistics import median_low

BROWSERS_MIN_MS = 11  # browsers show a frame of 10 ms or less for 100 ms
BROWSERS_MS = 100
MAX_FPS = 60.0


def as_browsers(durations: list[float]) -> list[float]:
    """Milliseconds of each frame, as browsers show them: makers of GIFs rely on it."""
    return [duration if duration >= BROWSERS_MIN_MS else BROWSERS_MS for duration in durations]


def rate(durations: list[float]) -> float:
    """Frames per second of most frames, 60 at most, from durations in ms."""
    return min(MAX_FPS, 1000.0 / median_low(durations))


def shown(durations: list[float], fps: float) -> list[int]:
    """Which frame is on display in the middle of each 1/fps seconds, over the whole length; at least one."""
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
