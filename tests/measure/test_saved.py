"""What autograd saves is counted to the byte, and told by module."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mobius_train.measure.saved import Saved, saved_for_backward
from mobius_train.storages import OUTSIDE, StorageFollower

ROWS, WIDTH = 64, 8
STATE = ROWS * WIDTH * 4


class TwoLayers(nn.Module):
    """A linear layer keeps its input, a sigmoid its result."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act = nn.Sigmoid()

    def layers(self, state: Tensor) -> Tensor:
        return self.act(self.second(self.first(state)))

    def forward(self, state: Tensor) -> Tensor:
        state = state * 2
        return checkpoint(self.layers, state, use_reentrant=False) if self.recompute else self.layers(state)


def saved_by(model: nn.Module, state: Tensor | None = None) -> Saved:
    state = torch.randn(ROWS, WIDTH) if state is None else state
    return saved_for_backward(lambda: model(state).sum(), {"model": model})[1]


def test_bytes_are_told_by_the_module_that_saves_them() -> None:
    assert saved_by(TwoLayers()).nbytes == {"model.first": STATE, "model.second": STATE, "model.act": STATE}


def test_parameters_count_as_tensors_and_not_as_bytes() -> None:
    saved = saved_by(TwoLayers())
    # The second layer's weight, for the gradient of its input, which the first does not compute.
    assert saved.tensors == {"model.first": 1, "model.second": 2, "model.act": 1}


def test_recomputation_keeps_its_input() -> None:
    assert saved_by(TwoLayers(recompute=True)).nbytes == {"model": STATE}


def test_nothing_is_kept_without_a_graph() -> None:
    saved = saved_by(TwoLayers().requires_grad_(False))
    assert (saved.total, saved.tensors) == (0, {})


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_fake_tensors_keep_as_much_as_real_ones(recompute: bool) -> None:
    real = saved_by(TwoLayers(recompute))
    with FakeTensorMode():
        assert saved_by(TwoLayers(recompute)) == real


def test_what_a_frozen_module_made_is_whose_graph_it_is_in() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.trained = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, state: Tensor) -> Tensor:
            with torch.no_grad():
                state = self.frozen(state)
            return checkpoint(self.trained, state, use_reentrant=False)

    saved = saved_by(Beside())
    assert saved.nbytes == {"model": STATE}
    assert saved.made == {"model.frozen": STATE}
    assert "model.frozen" not in saved.tensors


def test_selective_recomputation_keeps_the_chosen_results() -> None:
    class Selective(TwoLayers):
        def forward(self, state: Tensor) -> Tensor:
            contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
            return checkpoint(self.layers, state * 2, use_reentrant=False, context_fn=contexts)

    # The input and two products; no hook of autograd sees these.
    assert saved_by(Selective()).total == 3 * STATE


def test_a_storage_counts_once_however_often_it_is_saved() -> None:
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])
    state = torch.randn(ROWS, WIDTH)

    def forward() -> Tensor:
        # A slice keeps the whole.
        whole = state * 2
        return sum((layer(whole[: ROWS // 2]) for layer in model), torch.zeros(())).sum()

    _, saved = saved_for_backward(forward, {"model": model})
    assert saved.nbytes == {"model.0": STATE}
    assert saved.tensors == {"model.0": 1, "model.1": 1, "model.2": 1}


def test_work_outside_of_modules_is_told_apart() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    _, saved = saved_for_backward(lambda: model(torch.randn(ROWS, WIDTH)).square().mean(), {"model": model})
    assert saved.nbytes[OUTSIDE] == STATE


def test_hooks_are_gone_afterwards_also_after_a_failure() -> None:
    model = TwoLayers()
    with pytest.raises(RuntimeError):
        saved_by(model, torch.randn(ROWS, WIDTH + 1))
    saved_by(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_following_storages_keeps_none_alive() -> None:
    with StorageFollower() as live:
        kept = torch.ones(3) + 1
        gone = torch.ones(5) + 1
    assert sorted(storage.nbytes() for storage, _ in live.alive()) == [12, 20]
    del gone
    gc.collect()
    assert [storage.nbytes() for storage, _ in live.alive()] == [12]
    del kept


def test_only_what_lies_on_the_device_counts() -> None:
    model = TwoLayers()
    _, saved = saved_for_backward(lambda: model(torch.randn(ROWS, WIDTH)).sum(), {"": model}, torch.device("meta"))
    assert saved.total == 0
    assert saved.tensors
