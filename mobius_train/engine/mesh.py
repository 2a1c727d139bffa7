"""The ranks as a device mesh: over which of them FSDP shards, and over which it replicates."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mobius_train.config import FsdpConfig
from mobius_train.errors import MobiusError

REPLICATE, SHARD = "replicate", "shard"


def shard_size(fsdp: FsdpConfig, world_size: int, local_world_size: int) -> int:
    """Over how many ranks every parameter is sharded; a divisor of world_size.

    Raises:
        MobiusError: the settings contradict each other or the number of ranks.
    """
    if fsdp.sharding == "full":
        if fsdp.shard_size is not None:
            raise MobiusError(
                f"fsdp.shard_size={fsdp.shard_size} does nothing under fsdp.sharding=full, which shards over all ranks:"
                " remove it, or use fsdp.sharding=hybrid"
            )
        return world_size
    size = local_world_size if fsdp.shard_size is None else fsdp.shard_size
    source = "the ranks of a node" if fsdp.shard_size is None else f"fsdp.shard_size={size}"
    if not 1 < size < world_size or world_size % size:
        between = [n for n in range(2, world_size) if world_size % n == 0]
        remedy = f"set fsdp.shard_size to one of {between}" if between else "use fsdp.sharding=full"
        raise MobiusError(
            f"fsdp.sharding=hybrid cannot shard {world_size} rank(s) in groups of {size} ({source}), which must be of"
            f" the same size, more than one and of more than one rank: {remedy}"
        )
    return size


def make_mesh(size: int, world_size: int, device: torch.device) -> DeviceMesh:
    """All ranks, in replicas of `size` neighbours; without the dimension of the replicas where there is one."""
    if size == world_size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=(SHARD,))
    return init_device_mesh(device.type, (world_size // size, size), mesh_dim_names=(REPLICATE, SHARD))
