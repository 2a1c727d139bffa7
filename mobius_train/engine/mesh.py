"""The device mesh of the ranks: the dimension that FSDP shards over, and the one it replicates over."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mobius_train.config_sections import FsdpConfig
from mobius_train.errors import MobiusError

REPLICATE, SHARD = "replicate", "shard"


def shard_size(fsdp: FsdpConfig, world_size: int, local_world_size: int) -> int:
    """Return the number of ranks that each parameter is sharded over; it divides world_size.

    Raises:
        MobiusError: the settings contradict each other or the number of ranks.
    """
    if fsdp.sharding == "full":
        if fsdp.shard_size is not None:
            raise MobiusError(
                f"fsdp.shard_size={fsdp.shard_size} has no effect with fsdp.sharding=full, which shards over all ranks:"
                " remove it, or use fsdp.sharding=hybrid"
            )
        return world_size
    size = local_world_size if fsdp.shard_size is None else fsdp.shard_size
    source = "the ranks of a node" if fsdp.shard_size is None else f"fsdp.shard_size={size}"
    if not 1 < size < world_size or world_size % size:
        between = [n for n in range(2, world_size) if world_size % n == 0]
        remedy = f"set fsdp.shard_size to one of {between}" if between else "use fsdp.sharding=full"
        raise MobiusError(
            f"fsdp.sharding=hybrid cannot shard {world_size} rank(s) in groups of {size} ({source}): it needs at least"
            f" two groups of equal size with at least two ranks each; {remedy}"
        )
    return size


def make_mesh(size: int, world_size: int, device: torch.device) -> DeviceMesh:
    """Return a mesh of replicas of `size` consecutive ranks; a single replica has only the shard dimension."""
    if size == world_size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=(SHARD,))
    return init_device_mesh(device.type, (world_size // size, size), mesh_dim_names=(REPLICATE, SHARD))
