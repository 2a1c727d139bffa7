"""Offload tensors saved for the backward pass to host memory.

Copies run on a separate CUDA stream and overlap with computation: to the host during the forward pass, and back to the
GPU one unit ahead of the backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Smaller tensors are not worth a copy.
MIN_BYTES = 2**16


class Offload:
    """The offloaded units of one forward pass.

    On a CPU the copies are synchronous and serve only tests and plans.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        # The graph owns the copies, so each is freed after its last use.
        self._units: list[list[weakref.ref[HostCopy]]] = []

    @property
    def host_bytes(self) -> int:
        """Bytes currently in host memory."""
        return sum(copy.nbytes for unit in self._units for reference in unit if (copy := reference()) is not None)

    @contextmanager
    def unit(self) -> Iterator[None]:
        """Offload what autograd saves inside this context, except parameters and small tensors.

        Each storage is copied whole and once. Views are restored with their strides, because the summation order
        depends on them.
        """
        before = self._units[-1] if self._units else []
        copies: list[weakref.ref[HostCopy]] = []
        self._units.append(copies)
        # Keep the tensors until the unit ends: the address of a freed storage could be reused.
        known: dict[object, tuple[Tensor, HostCopy]] = {}

        def pack(tensor: Tensor) -> _Saved | Tensor:
            if tensor.nbytes < MIN_BYTES or isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
                return tensor
            key = (tensor.untyped_storage()._cdata, tensor.dtype, tensor._version)
            if key not in known:
                known[key] = (tensor, HostCopy(tensor, self._stream_of(tensor)))
                copies.append(weakref.ref(known[key][1]))
            return _Saved(known[key][1], tensor.shape, tensor.stride(), int(tensor.storage_offset()))

        def unpack(saved: _Saved | Tensor) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            # The backward pass uses the last saved tensor first, and then the preceding unit.
            for reference in (*reversed(copies), *reversed(before)):
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
    """A tensor's storage in host memory. Copies run on `stream`, or synchronously without one."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = tensor.device, stream
        self._fetched: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        flat = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        self._host = torch.empty_like(flat, device="cpu", pin_memory=stream is not None)
        self.nbytes = self._host.nbytes
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            # Its memory may be reused only after the copy.
            flat.record_stream(stream)
        # None keeps the current stream.
        with torch.cuda.stream(stream):
            self._host.copy_(flat, non_blocking=stream is not None)

    def start_fetching(self) -> None:
        """Start the copy back to the device, unless it has started already."""
        if self._fetched is not None:
            return
        with torch.cuda.stream(self._stream):
            self._fetched = self._host.to(self._device, non_blocking=self._stream is not None, copy=True)
        if self._stream is not None:
            self._arrived = self._stream.record_event()

    def fetched(self) -> Tensor:
        """The storage as a flat tensor on the device. The current stream waits for the copy."""
        self.start_fetching()
        assert self._fetched is not None
        if self._arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            self._fetched.record_stream(current)
        return self._fetched


class _Saved(NamedTuple):
    """Stands for a tensor in the graph: a view of a copy."""

    copy: HostCopy
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
