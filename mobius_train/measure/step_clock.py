"""The time of an optimizer step by part: each moment of a step belongs to one part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn

from mobius_train.models import Denoiser
from mobius_train.models.denoiser import branch_of_modules

FORWARD, BACKWARD = "forward", "backward"


class StepClock:
    """Divides time among the phases of a step, and within a phase among the branches of a denoiser.

    A moment belongs to the innermost module that runs, and thus to its branch: "forward: ring". "forward" alone is what
    no branch computes: noise, loss, casts. A branch that runs in the backward pass recomputes activations. Time on a
    GPU is that between events on the stream that is current when the clock is made; work on another stream takes the
    time for which this stream waits for it.

    Args:
        device: where the denoiser runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._parts: list[str] = []
        self._phase: str | None = None
        # The time at which each part begins; the part is None outside of all phases.
        self._began: list[tuple[str | None, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context for a phase. An inner phase interrupts an outer one."""
        before, self._phase = self._phase, name
        self._mark()
        try:
            yield
        finally:
            self._phase = before
            self._mark()

    @contextmanager
    def watch(self, denoiser: Denoiser) -> Iterator[None]:
        """Context in which the branches of `denoiser` count apart."""
        with ExitStack() as stack:
            compiled: set[nn.Module] = set()
            for module, branch in branch_of_modules(denoiser).items():
                if module is cast(nn.Module, denoiser) or module in compiled:
                    continue
                if module._compiled_call_impl is None:
                    stack.enter_context(self._hooked(module, branch))
                else:
                    stack.enter_context(self._wrapped(module, branch))
                    compiled.update(module.modules())
            yield

    def seconds(self) -> dict[str, float]:
        """Seconds by part since the last call, without the time outside of all phases."""
        if self._stream is not None:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (part, began), (_, ended) in zip(self._began, self._began[1:], strict=False):
            if part is not None:
                seconds = ended - began if self._stream is None else began.elapsed_time(ended) / 1e3
                found[part] = found.get(part, 0.0) + seconds
        self._began = []
        return found

    @contextmanager
    def _hooked(self, module: nn.Module, branch: str) -> Iterator[None]:
        # Recomputation ends the forward pass of its last module by an exception.
        entering = module.register_forward_pre_hook(lambda *_: self._enter(branch))
        leaving = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
        try:
            yield
        finally:
            entering.remove()
            leaving.remove()

    @contextmanager
    def _wrapped(self, module: nn.Module, branch: str) -> Iterator[None]:
        """Watch a compiled module from outside: its hooks, and those of modules in it, would be compiled with it."""
        call = cast(Callable[..., Any], module._compiled_call_impl)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._enter(branch)
            try:
                return call(*args, **kwargs)
            finally:
                self._leave()

        module._compiled_call_impl = watched
        try:
            yield
        finally:
            module._compiled_call_impl = call

    def _enter(self, branch: str) -> None:
        self._parts.append(branch)
        self._mark()

    def _leave(self) -> None:
        self._parts.pop()
        self._mark()

    def _mark(self) -> None:
        part = self._phase
        if part is not None and self._parts:
            part = f"{part}: {self._parts[-1]}"
        # Most modules are inside of others of their branch.
        if self._began and self._began[-1][0] == part:
            return
        moment: Any = time.perf_counter()
        if self._stream is not None:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(self._stream)
        self._began.append((part, moment))
