"""A sequence group: the ranks that share every clip, and the collectives between them.

Engines know nothing of it. They average gradients over all ranks of the job, and `Split.whole` scales each rank's
gradients so that this average is the gradient of the whole batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

KINDS = ("exchange", "gather", "reduce")


@dataclass(frozen=True)
class Sent:
    """What a rank sent to the others of its group.

    Attributes:
        bytes, calls: by kind of collective.
    """

    bytes: dict[str, int]
    calls: dict[str, int]

    def since(self, before: Sent) -> Sent:
        """What was sent after `before`."""
        return Sent(
            {kind: self.bytes[kind] - before.bytes[kind] for kind in self.bytes},
            {kind: self.calls[kind] - before.calls[kind] for kind in self.calls},
        )


class SequenceGroup(ABC):
    """The collectives of a sequence group. All its ranks call them in the same order.

    Attributes:
        rank: this rank in the group, from 0.
        size: P, the number of ranks.
        lookahead: how many features are on their way beside the ring's work: 1, or 0 without overlap.
    """

    def __init__(self, rank: int, size: int, lookahead: int = 1) -> None:
        self.rank, self.size, self.lookahead = rank, size, lookahead
        self._bytes = dict.fromkeys(KINDS, 0)
        self._calls = dict.fromkeys(KINDS, 0)

    @property
    def sent(self) -> Sent:
        """What this rank has sent since the group was made."""
        return Sent(dict(self._bytes), dict(self._calls))

    def exchange(self, sent: Tensor, to: Sequence[int], of: Sequence[int], ahead: bool = False) -> Callable[[], Tensor]:
        """Start an all-to-all: `to[j]` elements of the flat tensor go to rank j, `of[i]` elements come from rank i.

        Args:
            ahead: use a communicator of its own, so that the exchange can run beside the other collectives.

        Returns:
            A function that waits for the received elements, in the order of the ranks.
        """
        self._count("exchange", (sum(to) - to[self.rank]) * sent.itemsize)
        return self._exchange(sent, list(to), list(of), ahead)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, all of the same shape, along a new first axis."""
        self._count("gather", (self.size - 1) * tensor.nbytes)
        return self._gather(tensor.contiguous())

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all ranks, in a new tensor."""
        # The two halves of a ring all-reduce.
        self._count("reduce", 2 * (self.size - 1) * tensor.nbytes // self.size)
        return self._reduce(tensor.clone())

    @abstractmethod
    def _exchange(self, sent: Tensor, to: list[int], of: list[int], ahead: bool) -> Callable[[], Tensor]: ...

    @abstractmethod
    def _gather(self, tensor: Tensor) -> Tensor: ...

    @abstractmethod
    def _reduce(self, tensor: Tensor) -> Tensor: ...

    def _count(self, kind: str, sent: int) -> None:
        self._bytes[kind] += sent
        self._calls[kind] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies of a model share the ranks."""
        return self


class RankGroup(SequenceGroup):
    """A sequence group of the job's ranks."""

    def __init__(self, members: dist.ProcessGroup, ahead: dist.ProcessGroup | None) -> None:
        super().__init__(members.rank(), members.size(), lookahead=0 if ahead is None else 1)
        self._members, self._ahead = members, ahead or members

    def _exchange(self, sent: Tensor, to: list[int], of: list[int], ahead: bool) -> Callable[[], Tensor]:
        received = sent.new_empty(sum(of))
        members = self._ahead if ahead else self._members
        work = dist.all_to_all_single(received, sent, of, to, group=members, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return received

        return finish

    def _gather(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool:  # gloo has no collectives of bool
            return self._gather(tensor.view(torch.uint8)).view(torch.bool)
        flat = tensor.new_empty(self.size * tensor.numel())
        dist.all_gather_into_tensor(flat, tensor.flatten(), group=self._members)
        return flat.view(self.size, *tensor.shape)

    def _reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._members)
        return tensor


class SimulatedGroup(SequenceGroup):
    """A sequence group without other ranks, for fake tensors: shapes and bytes without values."""

    def _exchange(self, sent: Tensor, to: list[int], of: list[int], ahead: bool) -> Callable[[], Tensor]:
        received = sent.new_empty(sum(of))
        return lambda: received

    def _gather(self, tensor: Tensor) -> Tensor:
        return tensor.new_empty((self.size, *tensor.shape))

    def _reduce(self, tensor: Tensor) -> Tensor:
        return tensor


def make_group(rank: int, ranks: int, size: int, timeout: timedelta, overlap: bool = True) -> RankGroup:
    """The sequence group of this rank: ranks g·size … g·size + size - 1 are group g. Collective over all ranks.

    Args:
        overlap: exchange features beside the ring's work, with a communicator of their own.
    """
    mine: list[dist.ProcessGroup] = []
    for first in range(0, ranks, size):
        members = range(first, first + size)
        made = [dist.new_group(list(members), timeout=timeout) for _ in range(2 if overlap else 1)]
        if rank in members:
            mine = made
    return RankGroup(mine[0], mine[1] if overlap else None)
