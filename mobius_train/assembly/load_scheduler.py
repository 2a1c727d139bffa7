"""Load the scheduler that records a model's noise schedule."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from mobius_train.assembly.load_model import load_part

FLOW = FlowMatchEulerDiscreteScheduler.__name__


def load_scheduler(new_config: dict[str, Any] | None, name_or_path: str | None) -> SchedulerMixin:
    """A flow-matching scheduler if the configuration is of one, otherwise a DDPMScheduler with the saved schedule.

    Args:
        new_config: configuration of a new scheduler; `_class_name` defaults to DDPMScheduler.

    Raises:
        MobiusError: see `load_part`.
    """
    values = new_config if new_config is not None else _saved_config(name_or_path)
    kind = FlowMatchEulerDiscreteScheduler if values.get("_class_name") == FLOW else DDPMScheduler
    return load_part(kind, "scheduler", new_config, name_or_path)


def _saved_config(name_or_path: str | None) -> dict[str, Any]:
    """The saved configuration; empty if there is none, which `load_part` reports."""
    for place in ({"subfolder": "scheduler"}, {}):
        try:
            return dict(DDPMScheduler.load_config(name_or_path, **place))
        except (OSError, ValueError, TypeError):
            continue
    return {}
