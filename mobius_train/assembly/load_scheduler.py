"""Load the scheduler that records a model's noise schedule."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from mobius_train.assembly.load_model import load_part
from mobius_train.diffusion.sampler import is_flow
from mobius_train.pretrained.model_files import class_name
from mobius_train.pretrained.strict_load import find_model

PART = "scheduler"


def load_scheduler(new_config: dict[str, Any] | None, name_or_path: str | None) -> SchedulerMixin:
    """A flow-matching scheduler if the configuration is of one, otherwise a DDPMScheduler with the saved schedule.

    Args:
        new_config: configuration of a new scheduler; `_class_name` defaults to DDPMScheduler.

    Raises:
        MobiusError: see `load_part`.
    """
    values = {} if new_config is None else new_config
    if new_config is None and name_or_path is not None:
        # Without the class's name the numbers could be of any scheduler.
        folder = find_model(name_or_path, PART, DDPMScheduler.config_name).folder
        values = {"_class_name": class_name(folder, DDPMScheduler.config_name)}
    kind = FlowMatchEulerDiscreteScheduler if is_flow(values) else DDPMScheduler
    return load_part(kind, PART, new_config, name_or_path)
