"""Curves of a run's metrics, as points in the unit square for a drawing in SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from mobius_train.metrics.names import HELDOUT_LOSS, HELDOUT_MOTION, WEIGHT_CHANGE

# A curve of more points is averaged over as many equal ranges of steps.
MOST = 200
# Metric names by title. Those of a drawing have one scale.
TITLES: dict[str, tuple[str, ...]] = {
    "training loss": ("loss",),
    "held-out loss": (HELDOUT_LOSS,),
    "held-out loss, its motion part": (HELDOUT_MOTION,),
    "motion correlation of the samples": ("motion_correlation/samples", "motion_correlation/before"),
    "neighbour ratio": ("neighbour_ratio/samples", "neighbour_ratio/data", "neighbour_ratio/before"),
    "change of the trained weights": (WEIGHT_CHANGE,),
    "gradient norm": ("gradient_norm",),
    "learning rate": ("learning_rate",),
    "samples per second": ("samples_per_second",),
    "peak memory, GB": ("memory_gb", "memory_planned_gb"),
}


@dataclass(frozen=True)
class Curve:
    """One metric. `points` are (x, y) in the unit square, y downwards; `last` is the newest value as text."""

    name: str
    last: str
    points: str


@dataclass(frozen=True)
class Drawing:
    """Curves with one scale. The texts are the ends of the axes."""

    title: str
    curves: list[Curve]
    low: str
    high: str
    first: int
    final: int


def drawings(lines: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """One drawing for each of `TITLES` with a finite value.

    Args:
        lines: of metrics.jsonl; each has a `step`.
    """
    return [drawn for title, names in TITLES.items() if (drawn := _drawing(title, names, lines)) is not None]


def _drawing(title: str, names: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> Drawing | None:
    measured = {name: _values(name, lines) for name in names}
    measured = {name: values for name, values in measured.items() if values}
    if not measured:
        return None
    steps = [step for values in measured.values() for step, _ in values]
    first, final = min(steps), max(steps)
    found = {name: _averaged(values) for name, values in measured.items()}
    heights = [value for values in found.values() for _, value in values]
    low, high = min(heights), max(heights)

    def place(step: float, value: float) -> str:
        x = (step - first) / (final - first) if final > first else 0.5
        y = (high - value) / (high - low) if high > low else 0.5
        return f"{x:.4f},{y:.4f}"

    curves = [
        Curve(name.rpartition("/")[2] if len(names) > 1 else "", f"{values[-1][1]:.4g}", _path(values, place))
        for name, values in found.items()
    ]
    return Drawing(title, curves, f"{low:.3g}", f"{high:.3g}", int(first), int(final))


def _path(values: Sequence[tuple[float, float]], place: Any) -> str:
    if len(values) == 1:
        # One point is invisible.
        height = place(*values[0]).partition(",")[2]
        return f"0,{height} 1,{height}"
    return " ".join(place(step, value) for step, value in values)


def _values(name: str, lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, value) in order."""
    return [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]


def _averaged(values: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The values, or if there are more than `MOST` their means over as many ranges of steps."""
    if len(values) <= MOST:
        return values
    ends = [len(values) * number // MOST for number in range(MOST + 1)]
    ranges = [values[start:end] for start, end in pairwise(ends)]
    return [(fmean(step for step, _ in one), fmean(value for _, value in one)) for one in ranges]
