"""The frozen branch of the next micro-batch, run while the ring computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Value = TypeVar("Value")


def computed(values: Iterable[Value], only_last: bool = False) -> Iterator[Value]:
    """Compute all values now. Each is freed as soon as the consumer drops it.

    Args:
        only_last: keep the last one alone.
    """
    waiting = deque(values, maxlen=1 if only_last else None)

    def one_by_one() -> Iterator[Value]:
        while waiting:
            yield waiting.popleft()

    return one_by_one()


def one_ahead(values: Iterator[Value]) -> Iterator[Value]:
    """The same values; each is given when the next one has been made."""
    waiting = next(values)
    for value in values:
        yield waiting
        waiting = value


class SideStream:
    """A CUDA stream beside the current one. On another device the work runs in place.

    Its work waits for all work that is in the current stream at its start. So it may read whatever that has written.
    Memory needs nothing more: what the side stream allocated is used in the current stream before it is freed, and
    reused only by the side stream's later work, which waits for that use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def running(self) -> Iterator[Callable[[], None]]:
        """Context for work on this stream. Call what it gives before the current stream uses the results."""
        if self._stream is None:
            yield lambda: None
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        ended = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            yield lambda: torch.cuda.current_stream(self._device).wait_event(ended)
            ended.record()
