"""Download a recipe's remote shards before training, distributed over the ranks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from mobius_train.bars import progress
from mobius_train.config_sections import DataConfig
from mobius_train.data.clips import describe_source
from mobius_train.data.patterns import is_remote, naming
from mobius_train.data.remote import Remote, fetch_index, fetch_shard, remote_shards
from mobius_train.data.shards import listed_shard
from mobius_train.errors import MobiusError, without_secrets
from mobius_train.job.distributed import Distributed

# Seconds between progress exchanges of the ranks, so that no collective times out while another rank downloads.
ROUND = 30.0
# Seconds that NFS may need to show a file written by another node.
SHARED = 20.0


def naming_set(data: DataConfig, name: Literal["train", "validation"], number: int) -> AbstractContextManager[None]:
    """Context that adds the recipe's field to the error of a set that does not exist."""
    alone = len(getattr(data, name)) == 1
    field = f"data.{name}" if alone else f"data.{name}.{number}.path"
    return naming(field, f"set {field}=PATH to your clips (docs/data.md)")


def describe_data(data: DataConfig) -> dict[str, str]:
    """Describe each source by names and sizes, and remote sources by their number of addresses. Fetches nothing.

    Raises:
        MobiusError: a local source is missing, or an address has an unsupported scheme.
    """
    described = {}
    names: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    for name in names:
        for number, one in enumerate(getattr(data, name) or ()):
            if not one.repeats:
                continue
            shards = remote_sources(data, one.path)
            with naming_set(data, name, number):
                found = f"{len(shards)} addresses" if shards else describe_source(one.path)
            described[without_secrets(one.path)] = found
    return described


def remote_sources(data: DataConfig, source: str) -> list[Remote]:
    """The remote shards of a source; empty for local paths.

    Raises:
        MobiusError: an address has an unsupported scheme, or data.download_dir is not set.
    """
    if not is_remote(source):
        return []
    shards = remote_shards(source, data.download_dir or Path())
    if data.download_dir is None:
        raise MobiusError(f"{shards[0]} must be fetched: set data.download_dir=FOLDER to store fetched shards")
    return shards


def fetch_all(shards: Sequence[Remote], folder: Path, name: str, distributed: Distributed) -> list[Path]:
    """Fetch missing shards and return all local paths. Collective.

    Ranks that share a folder divide the work.

    Raises:
        MobiusError: a rank cannot fetch a shard. Raised on every rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    group = _sharers(folder, distributed)
    mine = _missing(shards)[group.index(distributed.rank) :: len(group)]
    _together(distributed, _indices(shards if group[0] == distributed.rank else [], distributed.is_main))
    _together(distributed, _fetch(mine, name, show=distributed.is_main))
    deadline = time.monotonic() + SHARED
    while absent := _missing(shards):
        if time.monotonic() > deadline:
            raise MobiusError(f"{absent[0].path} was fetched by another rank but is not visible on {distributed.rank}")
        time.sleep(0.5)
    return [shard.path for shard in shards]


def _missing(shards: Sequence[Remote]) -> list[Remote]:
    return [shard for shard in shards if not shard.path.exists()]


def _indices(shards: Sequence[Remote], show: bool) -> Iterator[None]:
    """Fetch the index.json of every folder with a missing shard."""
    places = {shard.path.parent: shard for shard in _missing(shards)}
    for shard in places.values():
        without = fetch_index(shard)
        if without is not None and show:
            print(f"no index.json to verify shards against, so only their ends are checked: {without}")
        yield


def _fetch(shards: Sequence[Remote], name: str, show: bool) -> Iterator[None]:
    sizes = [expected.bytes for shard in shards if (expected := listed_shard(shard.path)) is not None]
    total = sum(sizes) if len(sizes) == len(shards) else None
    with progress(total=total, unit="B", unit_scale=True, disable=not show or not shards) as bar:
        for number, shard in enumerate(shards, start=1):
            bar.set_description(f"fetching {name}, shard {number} of {len(shards)}")
            fetch_shard(shard, bar.update)
            yield


def _together(distributed: Distributed, work: Iterator[None]) -> None:
    """Run each rank's work; if one rank fails, stop all."""
    busy, complaint = True, ""
    while True:
        deadline = time.monotonic() + ROUND
        # The limit of a start holds for each round, however many shards there are.
        distributed.watch.enter("start", "fetching shards")
        while busy and time.monotonic() < deadline:
            try:
                busy = next(work, False) is None
            except MobiusError as error:
                busy, complaint = False, str(error)
        states = distributed.gather_objects((busy, complaint))
        complaints = [text for _, text in states if text]
        if complaints:
            raise MobiusError(complaints[0])
        if not any(still for still, _ in states):
            return


def _sharers(folder: Path, distributed: Distributed) -> list[int]:
    """The ranks that share this rank's folder, including this rank."""
    if distributed.world_size == 1:
        return [0]
    stem = f".rank-{distributed.broadcast_object(secrets.token_hex(4))}-"
    mark = folder / f"{stem}{distributed.rank}"
    mark.touch()
    distributed.barrier()
    seen = distributed.gather_objects({int(path.name.removeprefix(stem)) for path in folder.glob(f"{stem}*")})
    distributed.barrier()
    mark.unlink()
    # A file system may show a file late on some nodes, so one-sided visibility counts as sharing.
    group, size = {distributed.rank}, 0
    while size < len(group):
        size = len(group)
        group |= {rank for rank, others in enumerate(seen) if group & (others | {rank})}
        group |= {other for rank in group for other in seen[rank]}
    return sorted(group)
