"""Tensors saved for the backward pass, in host memory meanwhile.

Copies run on a CUDA stream of their own, so that they overlap with the computation: out while the forward pass goes on,
back one unit ahead of the backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Smaller ones are not worth a copy.
MIN_BYTES = 2**16


class Offload:
    """The offloaded units of one forward pass.

    On a CPU the copies are plain ones, of use to tests and plans alone.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        # The graph owns the copies, so that each goes as soon as its last use is over.
        self._units: list[list[weakref.ref[HostCopy]]] = []

    @property
    def host_bytes(self) -> int:
        """Bytes that lie in host memory now."""
        return sum(copy.nbytes for unit in self._units for reference in unit if (copy := reference()) is not None)

    @contextmanager
    def unit(self) -> Iterator[None]:
        """What autograd saves inside goes to host memory, all but parameters and small tensors.

        Whole storages go, each once: views of them are restored with their strides, on which the order of sums depends.
        """
        before = self._units[-1] if self._units else []
        mine: list[weakref.ref[HostCopy]] = []
        self._units.append(mine)
        # The tensors are kept until all are known: the address of a freed one could come again.
        known: dict[object, tuple[Tensor, HostCopy]] = {}

        def pack(tensor: Tensor) -> _Saved | Tensor:
            if tensor.nbytes < MIN_BYTES or isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
                return tensor
            key = (tensor.untyped_storage()._cdata, tensor.dtype, tensor._version)
            if key not in known:
                known[key] = (tensor, HostCopy(tensor, self._stream_of(tensor)))
                mine.append(weakref.ref(known[key][1]))
            return _Saved(known[key][1], tensor.shape, tensor.stride(), int(tensor.storage_offset()))

        def unpack(saved: _Saved | Tensor) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            # Last saved, first used; then the unit that the backward pass comes to next.
            for reference in (*reversed(mine), *reversed(before)):
                if (copy := reference()) is not None:
                    copy.start_fetching()
            return saved.copy.fetched().as_strided(saved.shape, saved.stride, saved.offset)

        with saved_tensors_hooks(pack, unpack):
            yield
        known.clear()

    def _stream_of(self, tensor: Tensor) -> torch.cuda.Stream | None:
        if self._stream is None and tensor.is_cuda:
            self._stream = torch.cuda.Stream(tensor.device)
        return self._stream


class HostCopy:
    """A tensor's storage in host memory; its copies run on `stream`, or at once where there is none."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = tensor.device, stream
        self._fetched: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        flat = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        self._host = torch.empty_like(flat, device="cpu", pin_memory=stream is not None)
        self.nbytes = self._host.nbytes
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            # Its memory may be used again only when the copy is done.
            flat.record_stream(stream)
        # None is the stream that is current already.
        with torch.cuda.stream(stream):
            self._host.copy_(flat, non_blocking=stream is not None)

    def start_fetching(self) -> None:
        """Begin to copy it back, if that has not begun."""
        if self._fetched is not None:
            return
        with torch.cuda.stream(self._stream):
            self._fetched = self._host.to(self._device, non_blocking=self._stream is not None, copy=True)
        if self._stream is not None:
            self._arrived = self._stream.record_event()

    def fetched(self) -> Tensor:
        """The storage as a flat tensor, for use on the current stream, which waits for it."""
        self.start_fetching()
        assert self._fetched is not None
        if self._arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            self._fetched.record_stream(current)
        return self._fetched


class _Saved(NamedTuple):
    """What the graph holds in place of a tensor: a view of a copy."""

    copy: HostCopy
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
