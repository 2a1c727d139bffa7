"""Plain copies for evaluation: the given weights, everything else as it was, and the live module untouched."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from mobius_train.tasks.inference import Inference


def module() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


def test_the_copy_has_the_given_weights_and_keeps_the_frozen_ones() -> None:
    live = module()
    inference = Inference(live, torch.device("cpu"), torch.float32)
    weights = {"1.weight": torch.ones(2, 4), "1.bias": torch.zeros(2)}
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    copy: Any = inference.model(weights)
    x = torch.randn(5, 3)
    torch.testing.assert_close(copy(x), live[0](x).sum(1, keepdim=True).expand(5, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert all(parameter.requires_grad for parameter in live[1].parameters())


def test_constants_are_copied_in_the_copys_dtype() -> None:
    live = module()
    live[1].register_buffer("positions", torch.arange(3.0))
    live[1].register_buffer("count", torch.tensor(7))
    inference = Inference(live, torch.device("cpu"), torch.bfloat16)
    weights = {name: p.detach().clone() for name, p in live.named_parameters() if p.requires_grad}
    copy: Any = inference.model(weights)
    assert copy[1].positions.dtype == torch.bfloat16
    assert copy[1].positions.tolist() == [0, 1, 2]
    assert (copy[1].count.dtype, int(copy[1].count)) == (torch.int64, 7)
    assert live[1].positions.dtype == torch.float32


def test_missing_or_foreign_weights_are_refused() -> None:
    inference = Inference(module(), torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="Missing key"):
        inference.model({"1.weight": torch.ones(2, 4)})


def test_the_template_takes_no_memory_and_survives_the_live_module() -> None:
    live = module()
    inference = Inference(live, torch.device("cpu"), torch.bfloat16)
    weights = {name: p.detach().clone() for name, p in live.named_parameters() if p.requires_grad}
    live[1].weight.data = torch.empty(0)  # as an engine that shards does
    copy: Any = inference.model(weights)
    assert copy[1].weight.dtype == torch.bfloat16
    assert all(parameter.is_meta for parameter in inference._template.parameters())


def test_frozen_weights_are_the_live_ones_where_an_engine_left_them_whole() -> None:
    live = module()
    inference = Inference(live, torch.device("cpu"), torch.bfloat16)
    weights = {name: p.detach().clone() for name, p in live.named_parameters() if p.requires_grad}
    for parameter in live[0].parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # as an engine casts
    copy: Any = inference.model(weights)
    assert copy[0].weight.data_ptr() == live[0].weight.data_ptr()
    assert not inference._before


def test_frozen_weights_that_zero3_has_partitioned_are_as_they_were() -> None:
    live = module()
    before = live[0].weight.detach().clone()
    inference = Inference(live, torch.device("cpu"), torch.float32)
    weights = {name: p.detach().clone() for name, p in live.named_parameters() if p.requires_grad}
    for number, parameter in enumerate(live[0].parameters()):
        parameter.ds_id = number
        parameter.data = torch.empty(0)
    for _ in range(2):
        assert torch.equal(cast(Any, inference.model(weights))[0].weight, before)
