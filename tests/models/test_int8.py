"""Frozen weights of eight bits: the size of the rounding, what is spared, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mobius_train.models.int8 import store_in_int8


def block(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(16, 32, 3),
        "norm": nn.GroupNorm(4, 32),
        "norm1": nn.ModuleDict({"linear": nn.Linear(8, 8)}),
    }
    layers["proj"] = nn.Linear(32, 64)
    made = nn.ModuleDict(layers).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    return made.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_changes_by_half_a_step_of_its_channel_at_most(dtype: torch.dtype) -> None:
    made = block(dtype)
    before = {name: p.clone() for name, p in made.named_parameters()}
    store_in_int8([made])
    for name in ("conv", "proj"):
        was, module = before[f"{name}.weight"].float(), made[name]
        stored, now = module.parametrizations.weight.original, module.weight
        assert (stored.dtype, now.dtype, stored.shape) == (torch.int8, dtype, was.shape)
        assert stored.abs().amax(tuple(range(1, was.ndim))).eq(127).all()
        step = was.abs().flatten(1).amax(1).view(-1, *[1] * (was.ndim - 1)) / 127
        # Half a step, and the rounding of the scale and of the product to the dtype.
        bound = step / 2 + 2 * torch.finfo(dtype).eps * was.abs()
        assert ((now.float() - was).abs() <= bound).all()
        change = (now.float() - was).norm() / was.norm()
        assert 0.002 < change < 0.012
    # Norms, biases, and what computes a norm's scale and shift.
    for name, parameter in made.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])
    assert isinstance(made["norm1"]["linear"].weight, nn.Parameter)
    assert {name for name in before if name not in dict(made.named_parameters())} == {"conv.weight", "proj.weight"}


def test_a_channel_of_zeros_stays_zero() -> None:
    layer = nn.Linear(4, 2).requires_grad_(False)
    layer.weight[0] = 0
    store_in_int8([layer])
    assert torch.equal(layer.weight[0], torch.zeros(4))
    assert layer.weight.isfinite().all()


def test_a_copy_computes_the_same_and_stays_apart() -> None:
    made = block(torch.float32)
    store_in_int8([made])
    other = copy.deepcopy(made)
    batch = torch.randn(3, 32)
    assert torch.equal(other["proj"](batch), made["proj"](batch))
    other["proj"].parametrizations.weight.original.zero_()
    assert made["proj"].weight.abs().sum() > 0
