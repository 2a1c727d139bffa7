"""Files of stages over the tiny pipeline and clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes import recipe, write

# Pictures, then short clips with pictures, then longer and larger ones with the optimizer's state.
GROWING: list[dict[str, Any]] = [
    {
        "name": "images",
        "stage": "text-to-image",
        "max_train_steps": 3,
        "data": {"buckets": [{"num_frames": 1, "width": 16, "height": 16}]},
    },
    {
        "name": "short",
        "max_train_steps": 3,
        "data": {"buckets": [{"num_frames": 2, "width": 16, "height": 16}]},
    },
    {
        "name": "long",
        "max_train_steps": 3,
        "data": {"buckets": [{"num_frames": 4, "width": 32, "height": 24}]},
        "start_from": "weights",
        "optimizer_state": "kept",
    },
]


def write_stages(folder: Path, pipeline: Path, clips: Path, stages: list[dict[str, Any]], **changes: Any) -> Path:
    """A base recipe with changes and its stages, in `folder`; the training goes to folder/out."""
    base = recipe(
        pipeline, clips, folder / "out", **{"validation": {"prompts": []}, "checkpointing_steps": 1} | changes
    )
    write(folder / "base.yaml", base)
    return write(folder / "stages.yaml", {"base": "base.yaml", "stages": stages})
