"""Suppression of the model libraries' output, which would hide the program's own."""

from __future__ import annotations

from mobius_train.job.environment import choose_accelerator


def quiet_libraries() -> None:
    """Limit diffusers and transformers to errors without progress bars; silence DeepSpeed, which diffusers imports."""
    choose_accelerator()
    # They read the chosen accelerator, and without torch they would only warn.
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
