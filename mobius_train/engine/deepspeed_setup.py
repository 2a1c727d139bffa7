"""Settings that DeepSpeed cannot detect: logging, the process group, no compiled CPU collectives."""

from __future__ import annotations

import logging
import warnings

import deepspeed
import deepspeed.ops
import torch

# DeepSpeed logs every option at INFO and every skipped step at WARNING. The training loop reports skipped steps.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed calls collectives by names that newer torch releases deprecate.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def join() -> None:
    """Make DeepSpeed use the existing process group."""
    if not torch.cuda.is_available():
        # On CPUs DeepSpeed would compile shared-memory collectives at its first start, which requires a compiler, a
        # writable home folder and minutes. gloo is used instead.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
