"""What of a model is trained, as patterns over parameter names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from mobius_train.errors import MobiusError
from mobius_train.models.composite import Composite


class Rule(NamedTuple):
    """Parameters whose whole name matches the regular expression are trained, or frozen."""

    pattern: str
    trained: bool


FULL = (Rule(r".*", True),)


def new_parts(model: Composite) -> tuple[Rule, ...]:
    """Freeze the image model inside a video model, and train its other parts."""
    return tuple(Rule(rf"{re.escape(name)}\..*", name != model.image_part) for name in model.parts)


def apply_freezing(module: nn.Module, rules: Sequence[Rule]) -> None:
    """Set `requires_grad` of every parameter by the first rule that covers it.

    Raises:
        MobiusError: a parameter that no rule covers, or a rule that covers no parameter. Nothing is set then.
    """
    parameters = dict(module.named_parameters())
    first = {name: _first_match(name, rules) for name in parameters}
    uncovered = [name for name, rule in first.items() if rule is None]
    if uncovered:
        raise MobiusError(
            f"no freezing rule covers {len(uncovered)} parameters of {type(module).__name__}, such as"
            f" {uncovered[0]!r}: add a rule that trains or freezes them. The rules: {list(rules)}"
        )
    idle = [rule for rule in rules if rule not in first.values()]
    if idle:
        raise MobiusError(f"these freezing rules cover no parameter of {type(module).__name__}: {idle}. Correct them")
    for name, rule in first.items():
        assert rule is not None
        parameters[name].requires_grad_(rule.trained)


def _first_match(name: str, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
