"""Choose the diffusion process of a model by its scheduler."""

from __future__ import annotations

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from mobius_train.config_sections import ObjectiveConfig
from mobius_train.diffusion.ddpm import DdpmProcess
from mobius_train.diffusion.flow import FlowProcess
from mobius_train.errors import MobiusError


def build_process(scheduler: SchedulerMixin, config: ObjectiveConfig) -> DdpmProcess | FlowProcess:
    """Flow matching for a flow-matching scheduler, DDPM for all others.

    Raises:
        MobiusError: the recipe's objective does not fit the process.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowProcess(scheduler, config)
    if config.flow_shift is not None:
        raise MobiusError(
            f"objective.flow_shift={config.flow_shift:g} is for flow matching, but this model has a"
            f" {type(scheduler).__name__}: remove it, or set scheduler_config with the _class_name"
            f" {FlowMatchEulerDiscreteScheduler.__name__}"
        )
    assert isinstance(scheduler, DDPMScheduler)
    return DdpmProcess(scheduler, config)
