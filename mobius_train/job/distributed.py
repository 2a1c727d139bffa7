"""The ranks of a job: their process group, and the few collectives that the loop needs."""

from __future__ import annotations

import os
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from mobius_train.errors import MobiusError, Stopped
from mobius_train.job.environment import Launch, meeting_point, node_name, nodes_by_rank
from mobius_train.job.heartbeat import Heartbeat, meet

# Long enough for one rank to encode a data set while the others wait; a rank that died is noticed by its heartbeat.
TIMEOUT = timedelta(minutes=60)
# Nodes that read Python from one file server do not start at the same time.
MEETING = timedelta(minutes=3)


class Distributed:
    """All ranks of the job, which it joins: NCCL on GPUs, gloo on CPUs. A single process is a job of one rank.

    Raises:
        MobiusError: there are more ranks on this node than GPUs, or a rank has not come within `meeting`.

    Attributes:
        device: this rank's GPU, or the CPU.
        is_main: True on rank 0, which writes and prints for all.
        nodes: the name of each rank's node.
    """

    def __init__(self, launch: Launch, meeting: timedelta = MEETING) -> None:
        self.rank, self.world_size = launch.rank, launch.world_size
        self.is_main = launch.rank == 0
        self.device = _device(launch)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        # A caller with a process group of its own keeps it: DeepSpeed remembers the first one of a process.
        self._joined = not dist.is_initialized()
        self._heartbeat: Heartbeat | None = None
        self.nodes = [node_name()] * self.world_size
        if self._joined:
            self._join(backend, meeting)

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
        if self._heartbeat is not None:
            self._heartbeat.leave()
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()

    def _join(self, backend: str, meeting: timedelta) -> None:
        rank, size = self.rank, self.world_size
        try:
            # torch's own rendezvous would wait for all ranks, and not say which are missing.
            host, port, mine, attempt = meeting_point(rank)
            server = dist.TCPStore(host, port, is_master=mine, timeout=meeting, wait_for_workers=False)
            store = dist.PrefixStore(attempt, server)
        except dist.DistError as error:
            raise MobiusError(f"rank {rank} on {node_name()} cannot meet rank 0 at {host}:{port}: {error}") from error
        if size > 1:
            self.nodes = meet(store, rank, size, node_name(), meeting, expected=nodes_by_rank())
            self._heartbeat = Heartbeat(store, rank, self.nodes)
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, rank=rank, world_size=size, store=group, timeout=TIMEOUT)

    def __enter__(self) -> Distributed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Stopped):
            self.close()
        elif self._heartbeat is not None:
            self._heartbeat.fail(error)


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
