"""The names of metrics in trackers, which show all names with one first part as a group."""

from __future__ import annotations

from collections.abc import Mapping

from mobius_train.metrics.names import HELDOUT_LOSS, HELDOUT_MOTION

# By the first part of the name in metrics.jsonl. A name that is not here is a group already, such as weight_change/all
# and the losses by quantile: heldout_loss/0.9.
GROUPS = {
    "loss": "train",
    "gradient_norm": "train",
    "learning_rate": "train",
    "step_applied": "train",
    "samples_per_second": "speed",
    "data_wait_share": "speed",
    "memory_gb": "memory",
    "memory_planned_gb": "memory",
    "frame_difference": "motion",
    "half_clip_difference": "motion",
    "neighbour_ratio": "motion",
    "motion_correlation": "motion",
}
# Their means over all quantiles are in a group of their own, beside each other.
MEANS = {HELDOUT_LOSS: "heldout/loss", HELDOUT_MOTION: "heldout/motion"}


def grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of metrics.jsonl by their names in trackers: loss is train/loss."""
    return {_grouped(name): value for name, value in metrics.items()}


def _grouped(name: str) -> str:
    first = name.partition("/")[0]
    return MEANS.get(name) or (f"{GROUPS[first]}/{name}" if first in GROUPS else name)
