from __future__ import annotations

import pytest
from torch import nn

from mobius_train.errors import MobiusError
from mobius_train.models import Rule, apply_freezing


@pytest.fixture
def module() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_the_first_rule_that_covers_a_parameter_counts(module: nn.Module) -> None:
    apply_freezing(module, [Rule(r"a\.bias", True), Rule(r"a\..*", False), Rule(r".*", True)])
    assert trained(module) == {"a.bias", "b.weight", "b.bias"}


def test_frozen_parameters_are_thawed_again(module: nn.Module) -> None:
    module.requires_grad_(False)
    apply_freezing(module, [Rule(r".*", True)])
    assert len(trained(module)) == 4


def test_an_uncovered_parameter_is_an_error_and_nothing_is_set(module: nn.Module) -> None:
    with pytest.raises(MobiusError, match=r"1 parameters.*'b.bias'"):
        apply_freezing(module, [Rule(r"a\..*", False), Rule(r"b\.weight", False)])
    assert len(trained(module)) == 4


def test_patterns_match_whole_names(module: nn.Module) -> None:
    with pytest.raises(MobiusError, match="4 parameters"):
        apply_freezing(module, [Rule(r"a", False), Rule(r"b", False)])


def test_a_rule_that_covers_nothing_is_an_error(module: nn.Module) -> None:
    with pytest.raises(MobiusError, match=r"no parameter of"):
        apply_freezing(module, [Rule(r".*", True), Rule(r"ring\..*", False)])
