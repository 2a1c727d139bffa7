"""The summary that a run prints at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mobius_train.config import RunConfig
from mobius_train.files import read_lines
from mobius_train.metrics.names import HELDOUT_LOSS, HELDOUT_MOTION, WEIGHT_CHANGE
from mobius_train.metrics.trackers.open_trackers import where_to_look
from mobius_train.model_card import sample_command
from mobius_train.run_files import FINAL, LOGS, METRICS, PAGE

# Of held-out clips.
LOSSES = {HELDOUT_LOSS: "held-out loss", HELDOUT_MOTION: "its motion part"}
# Of the samples; see `mobius_train.metrics.motion`.
FIGURES = {
    "motion_correlation": "motion correlation",
    "neighbour_ratio": "neighbour ratio",
    "frame_difference": "frame to frame",
    "half_clip_difference": "over half a clip",
}
SOURCES = {"/data": "in the data", "/before": "before training", "/samples": "after"}


def summary(
    config: RunConfig,
    output_dir: Path,
    shown: Sequence[Path],
    figures: Mapping[str, float],
    seconds: float,
    memory_gb: float,
) -> str:
    """The results of a finished run, and where they are.

    Args:
        shown: files of the last samples.
        figures: of the last samples, by name and source.
        seconds: duration of this start of the run.
        memory_gb: peak memory of a rank, in GB (1e9 bytes).
    """
    lines = [f"Done in {seconds / 60:.1f} minutes, peak memory {memory_gb:.2f} GB."]
    final = output_dir / FINAL
    rows = [
        *_of_metrics(output_dir / METRICS),
        *_of_figures(figures),
        *((path.suffix[1:], str(path)) for path in shown),
        ("metrics", str(output_dir / METRICS)),
        *([("trackers", where_to_look(config.report_to, output_dir / LOGS))] if config.report_to else []),
        ("page", str(output_dir / PAGE)),
        ("model", str(final)),
    ]
    lines += [f"  {name:<18} {text}" for name, text in rows]
    if config.stage == "text-to-video":
        prompt = next(iter(config.validation.prompts), "a prompt")
        lines += ["", f"Draw a clip: {sample_command(final, prompt)}"]
    return "\n".join(lines)


def _of_metrics(path: Path) -> Iterator[tuple[str, str]]:
    lines: list[dict[str, Any]] = []
    # A full disk leaves the last line incomplete, and later ones missing.
    with suppress(ValueError):
        for line in read_lines(path):
            lines.append(line)
    for name, meaning in LOSSES.items():
        values = [line[name] for line in lines if name in line]
        if values:
            yield meaning, f"{values[0]:.5f} before, {values[-1]:.5f} after"
    changes = [line[WEIGHT_CHANGE] for line in lines if WEIGHT_CHANGE in line]
    if changes:
        yield "weights", f"changed by {changes[-1]:.1%} of their norm"


def _of_figures(figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for name, meaning in FIGURES.items():
        texts = [f"{figures[name + s]:.2f} {text}" for s, text in SOURCES.items() if name + s in figures]
        if texts:
            yield meaning, ", ".join(texts)
    if "motion_correlation/clips" in figures:
        yield "", f"(the motion of {figures['motion_correlation/clips']:.0f} training clips)"
