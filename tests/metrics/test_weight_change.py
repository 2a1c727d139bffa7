from __future__ import annotations

import pytest
import torch
from torch import nn

from mobius_train.metrics.weight_change import SAMPLES, WeightChange


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), "head": nn.Linear(4, 2)})
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_each_part_has_the_ratio_of_its_norms() -> None:
    start = weights()
    change = WeightChange(start.items())
    now = {name: tensor * (1.5 if name.startswith("layers.1") else 1.0) for name, tensor in start.items()}
    found = change(now)
    assert found.keys() == {"layers.0", "layers.1", "head", "all"}
    assert found["layers.1"] == pytest.approx(0.5)
    assert found["layers.0"] == found["head"] == 0
    assert 0 < found["all"] < 0.5


def test_it_remembers_the_start_although_the_tensors_are_changed_in_place() -> None:
    live = weights()
    change = WeightChange(live.items())
    for tensor in live.values():
        tensor.mul_(1.25)
    assert change(live)["all"] == pytest.approx(0.25)


def test_a_large_tensor_is_estimated() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(5 * SAMPLES + 3, generator=generator)
    moved = before + 0.01 * torch.randn(len(before), generator=generator)
    assert WeightChange([("layer.weight", before)])({"layer.weight": moved})["layer"] == pytest.approx(0.01, rel=0.03)


def test_a_part_that_starts_at_zero() -> None:
    zero = {"conv.weight": torch.zeros(3), "conv.bias": torch.zeros(3)}
    change = WeightChange(zero.items())
    assert change(zero) == {"conv": 0.0, "all": 0.0}
    assert change({name: tensor + 1e-3 for name, tensor in zero.items()})["conv"] == pytest.approx(1)
