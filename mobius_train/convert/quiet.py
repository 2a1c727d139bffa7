"""Conversions speak for themselves: loading bars and hints of the model libraries would bury their reports."""

from __future__ import annotations

import os

import diffusers
import transformers


def quiet_libraries() -> None:
    """Let the model libraries say errors only."""
    # diffusers asks DeepSpeed for its device when it saves; without a word about it, DeepSpeed warns on CPUs.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
