"""The one place where environment variables are read, and set for the libraries that read them."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from mobius_train.errors import MobiusError

# (rank, local rank, number of ranks, ranks on this node) as each launcher names them.
LAUNCHERS = {
    "deepspeed or torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
}


@dataclass(frozen=True)
class Launch:
    """This process among those of the job."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def launch_environment() -> Launch:
    """Which process of which job this is; alone, when no launcher started it.

    Raises:
        MobiusError: the launcher's variables are incomplete or contradict each other.
    """
    for launcher, (rank, local_rank, world_size, local_world_size) in LAUNCHERS.items():
        names = (rank, local_rank, world_size)
        if rank not in os.environ:
            continue
        # A shell on a Slurm node has these too; without several tasks it is a process of its own.
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise MobiusError(f"{rank} is set but {', '.join(missing)} is not: start through {launcher}, or unset {rank}")
        try:
            values = [int(os.environ[name]) for name in names]
            local = int(os.environ.get(local_world_size, os.environ.get("LOCAL_SIZE", os.environ[world_size])))
        except ValueError as error:
            raise MobiusError(f"the variables of {launcher} ({', '.join(names)}) must be whole numbers: {error}") from error
        launch = Launch(*values, local_world_size=local)
        if not 0 <= launch.rank < launch.world_size or not 0 <= launch.local_rank < launch.world_size:
            raise MobiusError(f"{rank}={launch.rank} does not lie below {world_size}={launch.world_size}")
        return launch
    return Launch(rank=0, local_rank=0, world_size=1, local_world_size=1)


def prepare() -> Launch:
    """`launch_environment`, and what torch and DeepSpeed look for in the environment; before they are imported."""
    launch = launch_environment()
    os.environ["RANK"], os.environ["LOCAL_RANK"] = str(launch.rank), str(launch.local_rank)
    os.environ["WORLD_SIZE"] = str(launch.world_size)
    # DeepSpeed on a CPU would take the number of NUMA nodes for the number of ranks.
    os.environ["LOCAL_SIZE"] = str(launch.local_world_size)
    if launch.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    elif "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise MobiusError("several ranks need MASTER_ADDR and MASTER_PORT: the first node's name, and a free port on it")
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Tokenizers that have run in the parent warn of every data worker otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return launch


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
