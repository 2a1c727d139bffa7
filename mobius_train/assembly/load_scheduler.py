"""Load the scheduler that records a model's noise schedule."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from mobius_train.assembly.load_model import load_part
from mobius_train.diffusion.sampler import is_flow
from mobius_train.errors import MobiusError
from mobius_train.pretrained.model_files import class_name, read_json
from mobius_train.pretrained.strict_load import find_model

PART = "scheduler"


def load_scheduler(new_config: dict[str, Any] | None, name_or_path: str | None) -> SchedulerMixin:
    """A flow-matching scheduler if the configuration is of one, otherwise a DDPMScheduler with the saved schedule.

    Args:
        new_config: configuration of a new scheduler; `_class_name` defaults to DDPMScheduler.

    Raises:
        MobiusError: see `load_part` and `scheduler_class`.
    """
    values = {} if new_config is None else new_config
    if new_config is None and name_or_path is not None:
        folder = find_model(name_or_path, PART, DDPMScheduler.config_name).folder
        # Without the class's name the numbers could be of any scheduler.
        class_name(folder, DDPMScheduler.config_name)
        values = read_json(folder / DDPMScheduler.config_name)
    flow = scheduler_class(values) is FlowMatchEulerDiscreteScheduler
    return load_part(FlowMatchEulerDiscreteScheduler if flow else DDPMScheduler, PART, new_config, name_or_path)


def scheduler_class(values: dict[str, Any]) -> type[SchedulerMixin]:
    """The class of a scheduler's configuration.

    A sampler of a DDPM model records the model's noise schedule by its betas, whatever its class. Samplers of other
    models do not, and of those of flow matching only Euler's is supported, which all published models have.

    Raises:
        MobiusError: it is none of these.
    """
    if is_flow(values):
        return FlowMatchEulerDiscreteScheduler
    name = values.get("_class_name", DDPMScheduler.__name__)
    kind: Any = getattr(diffusers, str(name), None)
    known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    betas = known and "beta_schedule" in inspect.signature(kind.__init__).parameters
    flow = values.get("use_flow_sigmas") or values.get("prediction_type") == "flow_prediction"
    if betas and not flow:
        return kind
    if betas:
        reason = f"the scheduler {name} is set to flow matching"
    else:
        reason = f"the scheduler {name} has no betas" if known else f"there is no scheduler {name}"
    raise MobiusError(
        f"{reason}: give a flow-matching model scheduler_config={{_class_name:"
        f" {FlowMatchEulerDiscreteScheduler.__name__}, shift: …}}, and a model of DDPM that of a"
        f" {DDPMScheduler.__name__}"
    )
