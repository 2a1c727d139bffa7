"""The ranks of a job: their process group, and the few collectives that the loop needs."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mobius_train.environment import Launch
from mobius_train.errors import MobiusError

# Long enough for one rank to encode a data set while the others wait; a rank that died is noticed at once.
TIMEOUT = timedelta(minutes=60)


def start(launch: Launch) -> Distributed:
    """Join the job: NCCL on GPUs, gloo on CPUs.

    Raises:
        MobiusError: there are more ranks on this node than GPUs.
    """
    return Distributed(launch)


class Distributed:
    """All ranks of the job; a single process is a job of one rank.

    Attributes:
        device: this rank's GPU, or the CPU.
        is_main: True on rank 0, which writes and prints for all.
    """

    def __init__(self, launch: Launch) -> None:
        self.rank, self.world_size = launch.rank, launch.world_size
        self.is_main = launch.rank == 0
        self.device = _device(launch)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        # A caller with a process group of its own keeps it: DeepSpeed remembers the first one of a process.
        self._joined = not dist.is_initialized()
        if self._joined:
            dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=TIMEOUT)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over all ranks of each value, in one all-reduce; every rank gives the same names in order."""
        totals = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return dict(zip(values, (totals / self.world_size).tolist(), strict=True))

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leave the job, if it was joined here."""
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()


def _device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        # Ranks that each take all cores spend their time waiting for each other.
        share = max(1, len(os.sched_getaffinity(0)) // launch.local_world_size)
        torch.set_num_threads(min(torch.get_num_threads(), share))
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise MobiusError(
            f"rank {launch.rank} is number {launch.local_rank} (from 0) on its node, which has"
            f" {torch.cuda.device_count()} GPU(s): start one rank for each GPU"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device
