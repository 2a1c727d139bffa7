"""The configuration of a model of diffusers as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without diffusers' own entries, as JSON keeps it."""
    plain: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
    return plain
