"""The time of a step is divided among phases and branches. Time is counted by the modules, not by a clock."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobius_train.measure.step_clock import BACKWARD, FORWARD, StepClock


class Now:
    """Seconds that pass only when a module computes."""

    seconds = 0.0


class Takes(nn.Linear):
    def __init__(self, seconds: float, inner: nn.Module | None = None) -> None:
        super().__init__(4, 4)
        self.seconds, self.inner = seconds, inner

    def forward(self, x: Tensor) -> Tensor:
        Now.seconds += self.seconds
        x = super().forward(x)
        return x if self.inner is None else self.inner(x)


class Doubled(nn.Module):
    """A layer without side effects, which can be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


class Model(nn.Module):
    """A frozen layer, a ring layer that is recomputed, and a frozen layer that contains a ring layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.ring = Takes(1), nn.Sequential(Takes(10), Takes(10))
        self.mixed = Takes(100, Takes(1000))

    def branches(self) -> dict[str, list[nn.Module]]:
        return {"spatial": [self.frozen, self.mixed], "ring": [self.ring, self.mixed.inner]}  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        Now.seconds += 10000
        return self.mixed(checkpoint(self.ring, self.frozen(x), use_reentrant=False))


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    Now.seconds = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: Now.seconds)


def test_each_moment_belongs_to_one_part() -> None:
    model: Any = Model()
    clock = StepClock(torch.device("cpu"))
    with clock.watch(model):
        with clock.phase("outer"):
            Now.seconds += 0.5
            with clock.phase(FORWARD):
                loss = model(torch.ones(2, 4)).sum()
            Now.seconds += 0.25
        # Between the phases nobody counts.
        Now.seconds += 1e6
        with clock.phase(BACKWARD):
            Now.seconds += 2
            loss.backward()
    seconds = clock.seconds()
    assert seconds == {
        "outer": 0.75,
        "forward": 10000,
        "forward: spatial": 101,
        "forward: ring": 1020,
        "backward": 2,
        # The ring alone is recomputed.
        "backward: ring": 20,
    }
    assert clock.seconds() == {}


def test_modules_are_watched_only_in_the_context() -> None:
    model: Any = Model()
    clock = StepClock(torch.device("cpu"))
    with clock.watch(model):
        pass
    with clock.phase(FORWARD):
        model(torch.ones(2, 4))
    assert clock.seconds() == {"forward": 11121}


def test_a_failed_forward_leaves_its_branch() -> None:
    model: Any = Model()
    clock = StepClock(torch.device("cpu"))
    with clock.watch(model):
        with pytest.raises(RuntimeError), clock.phase(FORWARD):
            model(torch.ones(2, 3))
        with clock.phase("next"):
            Now.seconds += 5
    assert clock.seconds()["next"] == 5


def test_a_compiled_layer_is_watched_from_outside() -> None:
    """Hooks would be compiled with the layer."""
    model: Any = Model()
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model.ring = Doubled()
    model.ring.compile(backend=backend)
    model.ring(torch.ones(2, 4))
    graphs = len(compiled)
    assert graphs == 1
    clock = StepClock(torch.device("cpu"))
    with clock.watch(model), clock.phase(FORWARD):
        model.ring(torch.ones(2, 4))
    assert len(compiled) == graphs
    assert set(clock.seconds()) == {"forward", "forward: ring"}
    model.ring(torch.ones(2, 4))
    assert len(compiled) == graphs
