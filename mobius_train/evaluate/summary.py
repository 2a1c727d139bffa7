"""The report as rows of text: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mobius_train.evaluate.report import DimensionResult, DistanceResult, Report

DYNAMIC = "dynamic_dis"  # what is shown beside the dimensions that stills are best in


class Row(NamedTuple):
    """A figure. value: None if it was not measured, and `notes` name what it needs."""

    name: str
    value: str | None
    meaning: str
    better: str
    notes: list[str]


def rows(report: Report) -> Iterator[Row]:
    """All figures of the report, the measured ones first."""
    found = [_dimension(report, name, result) for name, result in report.dimensions.items()]
    found += [_distance(name, result) for name, result in report.distances.items()]
    found += _official(report)
    yield from sorted(found, key=lambda row: row.value is None)


def as_text(report: Report) -> str:
    """One line per figure."""
    lines = [f"{len(report.clips)} clips of {report.source}"]
    if report.reference is not None:
        lines.append(f"{report.reference_clips} reference clips of {report.reference}")
    for row in rows(report):
        value = "not measured" if row.value is None else row.value
        lines.append(f"{row.name:32} {value:>12}  {'; '.join(row.notes)}".rstrip())
    return "\n".join(lines)


def _dimension(report: Report, name: str, result: DimensionResult) -> Row:
    notes = _needs(result.needs)
    if result.value is not None and result.best_for_stills:
        dynamic = report.dimensions[DYNAMIC].value
        notes.append(f"best for stills: {DYNAMIC} {_text(dynamic) or 'not measured'}")
    if result.shuffled is not None and result.ahead_of_shuffled is not None:
        notes.append(f"shuffled frames {_text(result.shuffled)}, better than these in {result.ahead_of_shuffled:.0%}")
    every = result.clips + sum(result.unmeasured.values())
    notes += [f"{count} of {every} clips not: {why}" for why, count in result.unmeasured.items()]
    return Row(name, _text(result.value), result.meaning, result.better, notes)


def _distance(name: str, result: DistanceResult) -> Row:
    notes = _needs(result.needs)
    if result.value is not None:
        sees = "it sees the order of frames" if result.sees_order else "it does NOT see the order of frames"
        notes += [
            f"{result.clips} clips to {result.reference} reference clips, {result.features} features",
            f"half of the reference to the other {_text(result.halves)}, shuffled {_text(result.shuffled)}: {sees}",
        ]
        if min(result.clips, result.reference) <= result.features:
            notes.append("fewer clips than features: compare only with distances of equally many clips")
    return Row(name, _text(result.value), "Fréchet distance to the reference clips", "lower", notes)


def _official(report: Report) -> Iterator[Row]:
    """The official tool's figures; those that it did not measure share a row."""
    missing: dict[str, list[str]] = {}
    for name, result in report.vbench.items():
        if result.value is None:
            missing.setdefault(result.needs or "", []).append(name)
        else:
            yield Row(f"vbench {name}", _text(result.value), "measured by the official tool", "higher", [])
    for needs, names in missing.items():
        yield Row("vbench", None, "", "", [", ".join(names), *_needs(needs)])
    notes = [] if report.vbench_total is not None else _needs(f"all {len(report.vbench)} dimensions of VBench")
    yield Row("vbench total", _text(report.vbench_total), "VBench's weighted mean of its dimensions", "higher", notes)


def _needs(needs: str | None) -> list[str]:
    return [] if needs is None else [f"needs {needs}"]


def _text(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"
