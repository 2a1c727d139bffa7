"""Figures of the official VBench tool: its result files, and its total of all dimensions.

The ranges and weights are those of VBench's scripts/constant.py and scripts/cal_final_score.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mobius_train.errors import MobiusError
from mobius_train.evaluate.report import Report, VBenchResult
from mobius_train.files import read_small_json

QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1


class Scale(NamedTuple):
    """A dimension's part of the total: (value - lowest) / (highest - lowest), times the weight."""

    quality: bool
    lowest: float = 0.0
    highest: float = 1.0
    weight: float = 1.0


SCALES = {
    "subject_consistency": Scale(True, 0.1462),
    "background_consistency": Scale(True, 0.2615),
    "temporal_flickering": Scale(True, 0.6293),
    "motion_smoothness": Scale(True, 0.706, 0.9975),
    "dynamic_degree": Scale(True, weight=0.5),
    "aesthetic_quality": Scale(True),
    "imaging_quality": Scale(True),
    "object_class": Scale(False),
    "multiple_objects": Scale(False),
    "human_action": Scale(False),
    "color": Scale(False),
    "spatial_relationship": Scale(False),
    "scene": Scale(False, highest=0.8222),
    "appearance_style": Scale(False, 0.0009, 0.2855),
    "temporal_style": Scale(False, highest=0.364),
    "overall_consistency": Scale(False, highest=0.364),
}
NEEDS = "the official tool: clips in its layout by --vbench FOLDER, results by `merge`"


def unmeasured() -> dict[str, VBenchResult]:
    """All dimensions, without values."""
    return {name: VBenchResult(needs=NEEDS) for name in SCALES}


def total(values: Mapping[str, float | None]) -> float | None:
    """VBench's total of the 16 dimensions; None unless all are there."""
    parts = {}
    for quality in (True, False):
        scales = {name: scale for name, scale in SCALES.items() if scale.quality is quality}
        scores = []
        for name, scale in scales.items():
            value = values.get(name)
            if value is None:
                return None
            scores.append(scale.weight * (value - scale.lowest) / (scale.highest - scale.lowest))
        parts[quality] = sum(scores) / sum(scale.weight for scale in scales.values())
    weights = {True: QUALITY_WEIGHT, False: SEMANTIC_WEIGHT}
    return sum(parts[part] * weight for part, weight in weights.items()) / sum(weights.values())


def merge_results(report: Report, paths: list[Path]) -> None:
    """Add the results of *_eval_results.json files to a report, for the set and for each clip.

    A result file is {dimension: [value, [{"video_path": …, "video_results": …}, …]]}.

    Raises:
        MobiusError: a file is not such a result, or measured other clips.
    """
    clips = {clip.vbench_file: clip for clip in report.clips if clip.vbench_file is not None}
    if not clips:
        raise MobiusError("the report's clips have no files in VBench's layout: evaluate them with --vbench FOLDER")
    for path in paths:
        for dimension, (value, videos) in _read_results(path).items():
            report.vbench[dimension] = VBenchResult(value=value)
            for name, figure in videos.items():
                if name not in clips:
                    raise MobiusError(f"{path} has a result of {name}, which is not a clip of the report")
                clips[name].vbench[dimension] = figure
    report.vbench_total = total({name: result.value for name, result in report.vbench.items()})


def _read_results(path: Path) -> dict[str, tuple[float, dict[str, float]]]:
    """The value, and the values by file name, of each dimension."""
    try:
        content = read_small_json(path)
        unknown = sorted(set(content) - set(SCALES))
        if unknown:
            raise MobiusError(f"{path} has dimensions that VBench does not have: {', '.join(unknown)}")
        results = {}
        for dimension, (value, videos) in content.items():
            figures = {Path(video["video_path"]).name: _number(video["video_results"]) for video in videos}
            results[dimension] = (_number(value), figures)
    except OSError as error:
        raise MobiusError(f"cannot read VBench's results {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MobiusError(f"{path} is not a result file of VBench (*_eval_results.json): {error!r}") from error
    if not results:
        raise MobiusError(f"{path} has no dimension")
    return results


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not a number")
    return number
