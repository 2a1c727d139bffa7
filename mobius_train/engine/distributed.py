"""The ranks of a job: their process group, and the few collectives that the loop needs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mobius_train.environment import Launch

TIMEOUT = timedelta(minutes=30)


class Distributed:
    """All ranks of the job; one rank is a job too.

    Attributes:
        device: this rank's GPU, or the CPU.
    """

    def __init__(self, launch: Launch) -> None:
        self.rank, self.world_size = launch.rank, launch.world_size
        self.is_main = self.rank == 0
        if torch.cuda.is_available():
            self.device = torch.device("cuda", launch.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            # Ranks that each take all cores spend their time waiting for each other.
            if launch.local_world_size > 1:
                torch.set_num_threads(max(1, torch.get_num_threads() // launch.local_world_size))
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=TIMEOUT)

    def _reduced(self, values: dict[str, float], operation: Any) -> dict[str, float]:
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return dict(zip(values, tensor.tolist(), strict=True))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over all ranks of each value, in one all-reduce."""
        return {name: total / self.world_size for name, total in self._reduced(values, dist.ReduceOp.SUM).items()}

    def maximum(self, values: dict[str, float]) -> dict[str, float]:
        """The maximum over all ranks of each value, in one all-reduce."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def close(self) -> None:
        """End the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start(launch: Launch) -> Distributed:
    """Join the job: NCCL on GPUs, gloo on CPUs."""
    return Distributed(launch)
