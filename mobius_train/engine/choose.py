"""Which engine a run has, with all that can be wrong with its settings found before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from mobius_train.config import FsdpConfig
from mobius_train.engine.deepspeed import DeepSpeedEngine
from mobius_train.engine.ds_config import read, resolve
from mobius_train.engine.fsdp import FsdpEngine
from mobius_train.engine.mesh import make_mesh, shard_size
from mobius_train.engine.optimizers import check_optimizer
from mobius_train.engine.protocol import Engine
from mobius_train.engine.settings import EngineSettings
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import Launch

# (trained module, its units, ranks) → engine
MakeEngine = Callable[[nn.Module, Sequence[Sequence[nn.Module]], Distributed], Engine]


def choose_engine(settings: EngineSettings, fsdp: FsdpConfig, ds_path: Path | None, launch: Launch) -> MakeEngine:
    """DeepSpeed with the JSON at `ds_path`, or without one FSDP.

    Raises:
        MobiusError: the settings contradict each other, the recipe or the number of ranks.
    """
    if ds_path is None:
        size = shard_size(fsdp, launch.world_size, launch.local_world_size)
        check_optimizer(settings, offloaded=fsdp.cpu_offload)
        return partial(_fsdp, settings, fsdp, size)
    if fsdp != FsdpConfig():
        raise MobiusError("the recipe has fsdp settings, which do nothing under --engine deepspeed: remove them")
    ds_config = resolve(read(ds_path), settings, launch.world_size)
    check_optimizer(settings, offloaded="offload_optimizer" in ds_config["zero_optimization"])
    return partial(_deepspeed, settings, ds_config)


def _fsdp(
    settings: EngineSettings,
    fsdp: FsdpConfig,
    size: int,
    module: nn.Module,
    units: Sequence[Sequence[nn.Module]],
    distributed: Distributed,
) -> Engine:
    mesh = make_mesh(size, distributed.world_size, distributed.device)
    return FsdpEngine(module, units, settings, fsdp, mesh, distributed)


def _deepspeed(
    settings: EngineSettings,
    ds_config: dict[str, object],
    module: nn.Module,
    units: Sequence[Sequence[nn.Module]],
    distributed: Distributed,
) -> Engine:
    return DeepSpeedEngine(module, settings, ds_config, distributed)
