"""The ranks of a job, and the engine that shards the trained module over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobius_train.config import RunConfig
from mobius_train.config_sections import FsdpConfig
from mobius_train.engine.ds_config import read_ds_json, resolve
from mobius_train.engine.mesh import shard_size
from mobius_train.engine.optimizers import check_offload
from mobius_train.engine.settings import engine_settings
from mobius_train.errors import MobiusError
from mobius_train.job.environment import Launch

EngineName = Literal["deepspeed", "fsdp", "ddp"]


@dataclass(frozen=True)
class Spread:
    """The ranks of a job and its engine.

    Attributes:
        launch: this process among the ranks; for a plan, any of them.
        engine: fsdp uses the recipe's `fsdp` section. ddp is torch's DistributedDataParallel, which is planned for
            comparison and never trains.
        ds_json: the DeepSpeed JSON before it is resolved.
    """

    launch: Launch
    engine: EngineName = "deepspeed"
    ds_json: dict[str, Any] | None = None

    @classmethod
    def over(
        cls,
        ranks: int,
        engine: EngineName = "deepspeed",
        ds_json: dict[str, Any] | None = None,
        ranks_per_node: int | None = None,
    ) -> Spread:
        """Return the spread of a job that is not launched, for a plan.

        Args:
            ranks_per_node: None puts all ranks on one node.

        Raises:
            MobiusError: the numbers are not positive, or the nodes are not equally filled.
        """
        per_node = ranks if ranks_per_node is None else ranks_per_node
        if ranks < 1 or per_node < 1 or ranks % per_node:
            raise MobiusError(f"{ranks} rank(s), {per_node} per node: give 1 or more, and the same number on each node")
        return cls(Launch(0, 0, ranks, per_node), engine, ds_json)

    @property
    def ranks(self) -> int:
        return self.launch.world_size

    def check(self, config: RunConfig) -> None:
        """Check the recipe against the ranks and the engine.

        Raises:
            MobiusError: the recipe contradicts the number of ranks, the engine or the DeepSpeed JSON.
        """
        ranks, product = self.ranks, config.samples_per_step(self.ranks)
        sharing = config.sequence_parallel_size
        self._check_sequence(sharing, config.sequence_across_nodes)
        if config.global_batch_size not in (None, product):
            raise MobiusError(
                f"global_batch_size={config.global_batch_size}, but train_batch_size={config.train_batch_size} x"
                f" gradient_accumulation_steps={config.gradient_accumulation_steps} x {ranks} rank(s)"
                f"{'' if sharing == 1 else f' / sequence_parallel_size={sharing}'} = {product}: change one of them"
            )
        if config.shard_frozen and ranks == 1:
            raise MobiusError("shard_frozen=true needs more than one rank: use more ranks, or set shard_frozen=false")
        if self.engine != "deepspeed" and self.ds_json is not None:
            raise MobiusError(f"a DeepSpeed JSON was given, but the engine is {self.engine}: remove one of them")
        if self.engine != "fsdp" and config.fsdp != FsdpConfig():
            raise MobiusError(
                f"the recipe has fsdp settings, which have no effect when the engine is {self.engine}: remove them"
            )
        if self.engine == "fsdp":
            self.shard_size(config)
            check_offload(config.optimizer, config.fsdp.cpu_offload)
        elif self.engine == "deepspeed":
            check_offload(config.optimizer, "offload_optimizer" in self.resolved(config)["zero_optimization"])

    def _check_sequence(self, size: int, across_nodes: bool) -> None:
        ranks, per_node = self.ranks, self.launch.local_world_size
        if ranks % size:
            fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
            raise MobiusError(
                f"sequence_parallel_size={size} does not divide the {ranks} rank(s). Sizes that fit: {fitting}"
            )
        if per_node % size and not across_nodes:
            raise MobiusError(
                f"sequence_parallel_size={size}, but a node has {per_node} rank(s): ranks of several nodes would share"
                " clips over the network. Choose a size that divides the ranks of a node, or set"
                " sequence_across_nodes=true"
            )

    def describe(self, config: RunConfig) -> str:
        """The engine and what it shards."""
        if self.engine == "deepspeed":
            return f"DeepSpeed, ZeRO-{self.resolved(config)['zero_optimization']['stage']}"
        return f"FSDP, {config.fsdp.sharding} sharding" if self.engine == "fsdp" else self.engine

    def shard_size(self, config: RunConfig) -> int:
        """Return the number of ranks that each trained parameter is sharded over, under fsdp.

        Raises:
            MobiusError: the recipe's fsdp section contradicts itself or the number of ranks.
        """
        return shard_size(config.fsdp, self.launch.world_size, self.launch.local_world_size)

    def resolved(self, config: RunConfig) -> dict[str, Any]:
        """Return the DeepSpeed JSON with the recipe's values filled in, under deepspeed.

        Raises:
            MobiusError: the two contradict each other.
        """
        return resolve(self.ds_json or {}, engine_settings(config), self.ranks)


def spread_of(engine: EngineName, ds_path: Path | None, launch: Launch) -> Spread:
    """Return the spread of a launched job.

    Raises:
        MobiusError: the DeepSpeed JSON cannot be read.
    """
    return Spread(launch, engine, None if ds_path is None else read_ds_json(ds_path))
