"""What the model libraries say while they load would bury what the program has to say."""

from __future__ import annotations

import diffusers
import transformers

from mobius_train.job.environment import choose_accelerator


def quiet_libraries() -> None:
    """Let diffusers and transformers say errors only, without loading bars, and DeepSpeed, which diffusers imports."""
    choose_accelerator()
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
