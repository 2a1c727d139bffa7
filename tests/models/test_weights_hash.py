from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from mobius_train.models import weights_hash


def module() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_equal_weights_have_equal_hashes() -> None:
    assert re.fullmatch("[0-9a-f]{64}", weights_hash(module()))
    assert weights_hash(module()) == weights_hash(module())
    assert weights_hash(module()) == weights_hash(module().requires_grad_(False).eval())


def test_everything_about_the_weights_counts() -> None:
    changed = [module() for _ in range(6)]
    with torch.no_grad():
        weight = changed[0][0].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))
    changed[1][1].running_mean += 1
    changed[2].bfloat16()
    changed[3][0].weight = nn.Parameter(changed[3][0].weight.reshape(3, 4))
    changed[4].add_module("more", nn.Linear(1, 1))
    renamed = nn.Sequential()
    for name, child in changed[5].named_children():
        renamed.add_module(f"x{name}", copy.deepcopy(child))
    changed[5] = renamed
    hashes = {weights_hash(m) for m in (module(), *changed)}
    assert len(hashes) == 7


def test_memory_layout_does_not_count() -> None:
    torch.manual_seed(0)
    conv: Any = nn.Conv2d(4, 4, 3)
    before = weights_hash(conv)
    assert weights_hash(conv.to(memory_format=torch.channels_last)) == before
