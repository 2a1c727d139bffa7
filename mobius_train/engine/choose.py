"""Selection of the engine. All settings are checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from mobius_train.config import RunConfig
from mobius_train.engine.fsdp import FsdpEngine
from mobius_train.engine.mesh import make_mesh
from mobius_train.engine.optimizers import check_optimizer
from mobius_train.engine.protocol import Engine
from mobius_train.engine.settings import engine_settings
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import uses_mps

# (trained module, its units, ranks) → engine
MakeEngine = Callable[[nn.Module, Sequence[Sequence[nn.Module]], Distributed], Engine]


def choose_engine(config: RunConfig, spread: Spread) -> MakeEngine:
    """Return a factory for the engine that the spread names; call it once the model is loaded.

    Raises:
        MobiusError: the recipe, the number of ranks and the engine's settings contradict each other, or the engine or
            the optimizer is not available on this machine.
    """
    assert spread.engine != "ddp"
    spread.check(config)
    if spread.engine == "fsdp" and uses_mps():
        raise MobiusError(
            "torch's FSDP does not support Apple's GPUs: use --engine deepspeed, or export DS_ACCELERATOR=cpu to train"
            " on the CPU"
        )
    settings = engine_settings(config)
    check_optimizer(settings)
    if spread.engine == "fsdp":
        size = spread.shard_size(config)

        def make_fsdp(module: nn.Module, units: Sequence[Sequence[nn.Module]], distributed: Distributed) -> Engine:
            mesh = make_mesh(size, distributed.world_size, distributed.device)
            return FsdpEngine(module, units, settings, config.fsdp, mesh, distributed)

        return make_fsdp
    # This import takes seconds.
    from mobius_train.engine.deepspeed import DeepSpeedEngine

    ds_config = spread.resolved(config)
    return lambda module, units, distributed: DeepSpeedEngine(module, settings, ds_config, distributed)
