"""What a ring beside any transformer requires of its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def block_problems(config: Mapping[str, Any]) -> list[str]:
    """The reasons for which a transformer of this configuration cannot have a ring, empty for most."""
    problems = []
    if config["attention_head_dim"] % 2:
        problems.append(
            f"attention_head_dim={config['attention_head_dim']}: the ring rotates pairs of a head's channels by the"
            " frame number, so heads must have an even size"
        )
    if not config["num_layers"]:
        problems.append("num_layers=0: there is no block")
    return problems
