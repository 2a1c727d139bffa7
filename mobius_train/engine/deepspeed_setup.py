"""DeepSpeed told what it would not find out by itself."""

from __future__ import annotations

import logging
import warnings

import deepspeed
import deepspeed.ops
import torch

# DeepSpeed tells every option at INFO, and at WARNING of every step that it skipped, which the loop does.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# It calls collectives by names that newer releases of torch deprecate.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def join() -> None:
    """Show DeepSpeed the process group that is there."""
    if not torch.cuda.is_available():
        # On CPUs DeepSpeed would compile collectives over shared memory at its first start, for which it
        # wants a compiler, a writable home and minutes. gloo does the same.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
