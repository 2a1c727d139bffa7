"""Clips of several lengths and sizes, and pictures, with captions in variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clip_files import animation, write_tar

BUCKETS: list[dict[str, Any]] = [
    {"num_frames": 4, "width": 48, "height": 32},
    {"num_frames": 4, "width": 32, "height": 32},
    {"num_frames": 1, "width": 32, "height": 48, "share": 0.25},
]


def save_mixed(path: Path, count: int = 15) -> Path:
    """A shard in which a third of the clips each go to one of BUCKETS."""
    members: dict[str, bytes] = {}
    for number in range(count):
        frames, size = ((5, (50, 32)), (4, (32, 32)), (1, (40, 60)))[number % 3]
        caption: Any = [f"dog number {number}", {"text": "a dog that runs", "weight": 2}]
        if number % 5 == 0:
            caption = f"dog number {number}"
        members[f"clip{number:02d}.json"] = json.dumps({"caption": {"en": caption}}).encode()
        kind = "WEBP" if frames > 1 else "PNG"
        members[f"clip{number:02d}.{kind.lower()}"] = animation(frames, kind, size)
    return write_tar(path, members)
