"""Versions of the code that a run uses."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("mobius-train", "torch", "deepspeed", "diffusers", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python and the main packages, and the commit if run from a checkout."""
    result = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "not installed"
    commit = _commit()
    return result | ({"commit": commit} if commit else {})


def _commit() -> str | None:
    """Return the commit, with the suffix -dirty if files differ from it."""
    repository = Path(__file__).resolve().parents[2]
    if not (repository / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(repository), "describe", "--always", "--abbrev=40", "--dirty"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
