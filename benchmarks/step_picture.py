"""Draw the table of step_time.py: a bar for each variant, divided into the parts of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Parts below this share of a step in every variant are drawn together.
SMALL = 0.02
OTHERS = "all else"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a picture of the seconds of a step by part; the label is the ratio to the reference, where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    parts = [part for part in dict.fromkeys(part for row in rows for part in row["share"]) if _is_large(part, rows)]
    names = [row["variant"] for row in rows]
    left = [0.0] * len(rows)
    for part in [*parts, OTHERS]:
        if part == OTHERS:
            widths = [row["step_seconds"] - done for row, done in zip(rows, left, strict=True)]
        else:
            widths = [row["step_seconds"] * row["share"].get(part, 0.0) for row in rows]
        axes.barh(names, widths, left=left, label=part, color="lightgray" if part == OTHERS else None)
        left = [done + width for done, width in zip(left, widths, strict=True)]
    for number, row in enumerate(rows):
        if row["of_serial"] is not None:
            axes.text(row["step_seconds"], number, f" {row['of_serial']:.2f}", va="center", fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="seconds of an optimizer step (label: ratio to serial)")
    axes.margins(x=0.08)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def _is_large(part: str, rows: list[dict[str, Any]]) -> bool:
    return any(row["share"].get(part, 0.0) >= SMALL for row in rows)
