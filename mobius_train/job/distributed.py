"""The process group of a job, and the collectives that the training loop needs."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mobius_train.devices import collective_device
from mobius_train.errors import Interrupted, MobiusError, Stopped
from mobius_train.job.environment import Launch, meeting_point, node_name, nodes_by_rank, uses_mps
from mobius_train.job.heartbeat import STALLED, Heartbeat, meet, name_of
from mobius_train.job.watch import Watch
from mobius_train.sequence.group import RankGroup, make_group

# Long enough for one rank to encode a data set while the others wait. The heartbeat detects dead ranks earlier.
TIMEOUT = timedelta(minutes=60)
# Nodes that load Python from a shared file server start at different times.
MEETING = timedelta(minutes=3)
Value = TypeVar("Value")


class Distributed:
    """The ranks of a job. The constructor joins the process group: NCCL on CUDA GPUs, otherwise gloo.

    A single process is a job of one rank.

    Raises:
        MobiusError: this node has more ranks than GPUs, or a rank did not join within `meeting`.

    Attributes:
        sequence: the ranks that share this rank's clips; None if it has its own.
        device: this rank's GPU, or the CPU. An Apple GPU for a single rank.
        is_main: True on rank 0, the only rank that writes and prints.
        nodes: the name of each rank's node.
        watch: what this rank does. It ends the job when an activity takes longer than its limit.

    Args:
        limits: seconds of each kind of activity, see `Watch`; None for no limits.
    """

    def __init__(self, launch: Launch, meeting: timedelta = MEETING, limits: Mapping[str, float] | None = None) -> None:
        self.rank, self.world_size = launch.rank, launch.world_size
        self.is_main = launch.rank == 0
        self.device = _device(launch)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        # An existing process group is kept, because DeepSpeed caches the first group of a process.
        self._joined = not dist.is_initialized()
        self._heartbeat: Heartbeat | None = None
        self.sequence: RankGroup | None = None
        self.nodes = [node_name()] * self.world_size
        self.watch = Watch(limits or {}, self._stalled)
        if self._joined:
            self._join(backend, meeting)

    def share_clips(self, size: int, overlap: bool) -> None:
        """Let `size` consecutive ranks share every clip. All ranks call it.

        Args:
            size: divides the number of ranks; 1 gives each rank its own clips.
            overlap: see `make_group`.
        """
        if size == 1:
            self.sequence = None
        elif self.sequence is None or (self.sequence.size, self.sequence.lookahead) != (size, int(overlap)):
            self.sequence = make_group(self.rank, self.world_size, size, TIMEOUT, overlap)

    @property
    def data_rank(self) -> int:
        """The number of this rank's share of the data. Ranks that share clips have the same."""
        return self.rank // (1 if self.sequence is None else self.sequence.size)

    @property
    def data_size(self) -> int:
        """The number of shares of the data."""
        return self.world_size // (1 if self.sequence is None else self.sequence.size)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Average each value over all ranks in one all-reduce. All ranks pass the same names in the same order."""
        if self.world_size == 1:
            # A GPU would be waited for.
            return dict(values)
        totals = torch.tensor(list(values.values()), dtype=torch.float64, device=collective_device(self.device))
        dist.all_reduce(totals)
        return dict(zip(values, (totals / self.world_size).tolist(), strict=True))

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=collective_device(self.device))
        return box[0]

    def on_main(self, act: Callable[[], Value]) -> Value:
        """Call `act` on rank 0 alone, and return its value on every rank.

        Raises:
            MobiusError: rank 0's, on every rank.
        """
        outcome: Value | MobiusError | None = None
        if self.is_main:
            try:
                outcome = act()
            except MobiusError as error:
                outcome = error
        outcome = self.broadcast_object(outcome)
        if isinstance(outcome, MobiusError):
            raise outcome
        return cast(Value, outcome)

    def divide(self, act: Callable[[int, int], Value]) -> list[Value]:
        """Call `act(rank, world_size)` on every rank, and return the values of all, in rank order, on every rank.

        Raises:
            MobiusError: the first rank's that raised one, on every rank.
        """
        if self.world_size == 1:
            return [act(0, 1)]
        outcome: Value | MobiusError
        try:
            outcome = act(self.rank, self.world_size)
        except MobiusError as error:
            outcome = error
        outcomes = self.gather_objects(outcome)
        for one in outcomes:
            if isinstance(one, MobiusError):
                raise one
        return outcomes

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def peak_memory_gb(self) -> float:
        """Peak memory of this process so far in GB (1e9 bytes): allocated on a CUDA GPU, otherwise resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return peak_resident_bytes() / 1e9

    def close(self) -> None:
        """Leave the process group, if this object joined it."""
        self.watch.close()
        if self._heartbeat is not None:
            self._heartbeat.leave()
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()

    def _join(self, backend: str, meeting: timedelta) -> None:
        rank, size = self.rank, self.world_size
        try:
            # torch's own rendezvous would wait for all ranks without naming the missing ones.
            host, port, is_server, attempt = meeting_point(rank)
            server = dist.TCPStore(host, port, is_master=is_server, timeout=meeting, wait_for_workers=False)
            store = dist.PrefixStore(attempt, server)
        except dist.DistError as error:
            where = f"rank {rank} on {node_name()}"
            raise MobiusError(f"{where} cannot connect to rank 0 at {host}:{port}: {error}") from error
        if size > 1:
            self.nodes = meet(store, rank, size, node_name(), meeting, expected=nodes_by_rank())
            self._heartbeat = Heartbeat(store, rank, self.nodes, lambda: self.watch.doing)
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, rank=rank, world_size=size, store=group, timeout=TIMEOUT)

    def _stalled(self, reason: str) -> None:
        heartbeat = self._heartbeat
        stall = f"{name_of(self.rank, self.nodes)}{STALLED}{reason}" if heartbeat is None else heartbeat.stall(reason)
        print(f"error: {stall}; resume from the last checkpoint", file=sys.stderr, flush=True)
        if heartbeat is not None:
            heartbeat.stalled(stall)

    def __enter__(self) -> Distributed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watch.close()
        if error is None or (isinstance(error, Stopped) and not isinstance(error, Interrupted)):
            self.close()
        elif self._heartbeat is not None:
            self._heartbeat.fail(error)


def peak_resident_bytes() -> int:
    """Peak resident set of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak * (1 if sys.platform == "darwin" else 1024)


def _cores() -> int:
    """The number of cores that this process may use. macOS does not restrict them."""
    return len(os.sched_getaffinity(0)) if sys.platform != "darwin" else os.cpu_count() or 1


def _device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        # Ranks that each use all cores slow each other down.
        share = max(1, _cores() // launch.local_world_size)
        torch.set_num_threads(min(torch.get_num_threads(), share))
        return torch.device("mps" if uses_mps() else "cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise MobiusError(
            f"rank {launch.rank} has local rank {launch.local_rank} (from 0), but its node has"
            f" {torch.cuda.device_count()} GPU(s): start one rank per GPU"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device
