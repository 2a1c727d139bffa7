"""The engine of a run, with all that can be wrong with its settings found before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from mobius_train.config import RunConfig
from mobius_train.engine.deepspeed import DeepSpeedEngine
from mobius_train.engine.fsdp import FsdpEngine
from mobius_train.engine.mesh import make_mesh
from mobius_train.engine.optimizers import check_optimizer
from mobius_train.engine.protocol import Engine
from mobius_train.engine.settings import engine_settings
from mobius_train.engine.spread import Spread
from mobius_train.job.distributed import Distributed

# (trained module, its units, ranks) → engine
MakeEngine = Callable[[nn.Module, Sequence[Sequence[nn.Module]], Distributed], Engine]


def choose_engine(config: RunConfig, spread: Spread) -> MakeEngine:
    """The engine that the spread names, to be made when the model is there.

    Raises:
        MobiusError: the recipe, the number of ranks and the engine's settings contradict each other, or this machine
            does not have the optimizer.
    """
    assert spread.engine != "ddp"
    spread.check(config)
    settings = engine_settings(config)
    check_optimizer(settings)
    if spread.engine == "fsdp":
        size = spread.shard_size(config)

        def make_fsdp(module: nn.Module, units: Sequence[Sequence[nn.Module]], distributed: Distributed) -> Engine:
            mesh = make_mesh(size, distributed.world_size, distributed.device)
            return FsdpEngine(module, units, settings, config.fsdp, mesh, distributed)

        return make_fsdp
    ds_config = spread.resolved(config)
    return lambda module, units, distributed: DeepSpeedEngine(module, settings, ds_config, distributed)
