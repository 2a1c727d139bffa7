"""Which code a run is."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("mobius-train", "torch", "deepspeed", "diffusers", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Versions by package, Python's, and the commit where the package runs from a checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def _commit() -> str | None:
    """The commit, with -dirty after it if files differ from it."""
    repository = Path(__file__).resolve().parents[2]
    if not (repository / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(repository), "describe", "--always", "--abbrev=40", "--dirty"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
