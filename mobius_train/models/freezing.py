"""Selection of a model's trained parameters by patterns over their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from mobius_train.errors import MobiusError
from mobius_train.models.composite import Composite


class Rule(NamedTuple):
    """Trains or freezes the parameters whose whole name matches the regular expression."""

    pattern: str
    trained: bool


FULL = (Rule(r".*", True),)


def new_parts(model: Composite) -> tuple[Rule, ...]:
    """Rules that freeze the image model inside a video model and train all other parts."""
    return tuple(Rule(rf"{re.escape(name)}\..*", name != model.image_part) for name in model.parts)


def apply_freezing(module: nn.Module, rules: Sequence[Rule]) -> None:
    """Set `requires_grad` of every parameter by the first rule that matches it.

    Raises:
        MobiusError: no rule matches a parameter, or a rule matches no parameter. No parameter is changed then.
    """
    parameters = dict(module.named_parameters())
    first = {name: _first_match(name, rules) for name in parameters}
    uncovered = [name for name, rule in first.items() if rule is None]
    if uncovered:
        raise MobiusError(
            f"no freezing rule matches {len(uncovered)} parameters of {type(module).__name__}, such as"
            f" {uncovered[0]!r}: add a rule that trains or freezes them. Rules: {list(rules)}"
        )
    idle = [rule for rule in rules if rule not in first.values()]
    if idle:
        raise MobiusError(f"these freezing rules match no parameter of {type(module).__name__}: {idle}. Correct them")
    for name, rule in first.items():
        assert rule is not None
        parameters[name].requires_grad_(rule.trained)


def _first_match(name: str, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
