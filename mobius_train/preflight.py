"""Checks of all nodes before the models load. They take seconds and name the nodes that differ or fail."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mobius_train.assembly.fetch import describe_data
from mobius_train.config import RunConfig
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.job.heartbeat import name_of
from mobius_train.job.versions import versions
from mobius_train.pretrained.model_names import check_local

logger = logging.getLogger(__name__)

# Seconds. Checkpoints and logs are ordered by time stamps.
CLOCKS = 5.0
# Seconds that NFS can take to show a file from another node.
SHARED = 20.0
# Bytes of the all-reduce: enough to saturate the network, but quick.
BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}
REPETITIONS = 3
LIMIT = 60


class Facts(NamedTuple):
    """The report of one rank."""

    alike: dict[str, str]
    """Values that must be equal on all ranks, by their names in messages."""
    clock: float
    """Seconds since 1970, right after a barrier."""
    complaint: str
    """Error of this rank; empty if there is none."""


class Ready(NamedTuple):
    """A summary line, and the planned bytes of a rank without the CUDA context; None if nothing was planned."""

    line: str
    planned: int | None


def preflight(config: RunConfig, spread: Spread, output_dir: Path, distributed: Distributed) -> Ready:
    """Check all ranks against each other. All ranks call it.

    Raises:
        MobiusError: ranks differ or fail a check; rank 0's message names each of them.
    """
    started = time.monotonic()
    facts = _gather(config, distributed)
    _refuse(differences(facts, distributed.nodes) + _unshared(output_dir, distributed), distributed)
    # These imports take a second, which a start on one rank does not need.
    from mobius_train.plan.fit import fit

    memory = fit(config, spread, distributed)
    _refuse(memory.too_small, distributed)
    clocks = [fact.clock for fact in facts]
    line = (
        f"preflight: {distributed.world_size} rank(s) on {len(set(distributed.nodes))} node(s) agree on versions,"
        f" commit, configuration and data; {_all_reduce(distributed)}; {memory.text};{_placement(config, distributed)}"
        f" clocks within {max(clocks) - min(clocks):.2f} s; took {time.monotonic() - started:.1f} s"
    )
    return Ready(line, memory.planned)


def _placement(config: RunConfig, distributed: Distributed) -> str:
    """The ranks that share clips, and a warning of those on several nodes; empty if each rank has its own clips."""
    size, nodes = config.sequence_parallel_size, distributed.nodes
    if size == 1:
        return ""
    groups = [range(first, first + size) for first in range(0, len(nodes), size)]
    apart = [group for group in groups if len({nodes[rank] for rank in group}) > 1]
    if apart and distributed.is_main:
        listed = ", ".join(f"{group[0]} to {group[-1]}" for group in apart)
        logger.warning("ranks %s share clips over the network between nodes: each layer waits for it", listed)
    return f" {len(groups)} group(s) of {size} ranks share clips, {len(groups) - len(apart)} within a node;"


def _refuse(problems: list[str], distributed: Distributed) -> None:
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise MobiusError(f"the nodes are not ready:\n{listed}" if distributed.is_main else "see rank 0's error")


def _gather(config: RunConfig, distributed: Distributed) -> list[Facts]:
    alike, complaints = _alike(config), []
    for check in CHECKS:
        try:
            alike |= check(config)
        except (MobiusError, OSError) as error:
            complaints.append(str(error))
    distributed.barrier()
    return distributed.gather_objects(Facts(alike, time.time(), "; ".join(complaints)))


def differences(facts: list[Facts], nodes: list[str]) -> list[str]:
    """Return the differences between ranks and the errors of single ranks, with the names of these ranks."""
    problems = []
    for name in dict.fromkeys(name for fact in facts for name in fact.alike):
        # A rank that cannot determine a value reports an error instead.
        values = {rank: fact.alike[name] for rank, fact in enumerate(facts) if name in fact.alike}
        usual = Counter(values.values()).most_common(1)[0][0]
        odd = defaultdict(list)
        for rank, value in values.items():
            if value != usual:
                odd[value].append(rank)
        problems += [f"{_names(ranks, nodes)}: {name} is {value}, elsewhere {usual}" for value, ranks in odd.items()]
    clocks = sorted(fact.clock for fact in facts)
    usual_clock = clocks[len(clocks) // 2]
    for rank, fact in enumerate(facts):
        if abs(fact.clock - usual_clock) > CLOCKS:
            problems.append(f"{name_of(rank, nodes)}: its clock is {fact.clock - usual_clock:+.0f} s from the others'")
        if fact.complaint:
            problems.append(f"{name_of(rank, nodes)}: {fact.complaint}")
    return problems


def _names(ranks: list[int], nodes: list[str]) -> str:
    shown = ", ".join(name_of(rank, nodes) for rank in ranks[:8])
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def _alike(config: RunConfig) -> dict[str, str]:
    return {
        **versions(),
        "CUDA": str(torch.version.cuda),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "configuration": hashlib.sha256(config.dump().encode()).hexdigest()[:12],
    }


def _models(config: RunConfig) -> dict[str, str]:
    for name in (config.pretrained_model_name_or_path, config.vae_name_or_path, config.text_encoder_name_or_path):
        if name is not None:
            check_local(name)
    return {}


def _data(config: RunConfig) -> dict[str, str]:
    return describe_data(config.data)


# Checks of a single rank. They return values that must be equal on all ranks, or raise MobiusError.
CHECKS: tuple[Callable[[RunConfig], dict[str, str]], ...] = (_models, _data)


def _unshared(output_dir: Path, distributed: Distributed) -> list[str]:
    """Return a problem for each rank that does not share the output folder with rank 0. Leaves no files."""
    above = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.is_dir())
    folder = above / distributed.broadcast_object(f".preflight-{secrets.token_hex(4)}")
    if distributed.is_main:
        folder.mkdir()
    distributed.barrier()
    complaint = _until_shared(lambda: (folder / str(distributed.rank)).touch())
    complaints = distributed.gather_objects(complaint)
    unseen = None
    if distributed.is_main:
        wrote = [rank for rank, text in enumerate(complaints) if text is None]
        unseen = _until_shared(lambda: _see(folder, wrote))
        shutil.rmtree(folder)
    unseen = distributed.broadcast_object(unseen)
    problems = [
        f"{name_of(rank, distributed.nodes)}: cannot write to rank 0's {above}: all nodes must share it ({text})"
        for rank, text in enumerate(complaints)
        if text is not None
    ]
    return problems + ([f"rank 0 cannot see what other ranks wrote to {above}: {unseen}"] if unseen else [])


def _until_shared(act: Callable[[], None]) -> str | None:
    """Retry for SHARED seconds; return None on success, else the last error."""
    deadline = time.monotonic() + SHARED
    while True:
        try:
            act()
            return None
        except OSError as error:
            if time.monotonic() > deadline:
                return error.strerror or str(error)
            time.sleep(0.5)


def _see(folder: Path, ranks: list[int]) -> None:
    missing = sorted({str(rank) for rank in ranks} - set(os.listdir(folder)), key=int)
    if missing:
        raise OSError(f"nothing from ranks {', '.join(missing)}")


def _all_reduce(distributed: Distributed) -> str:
    """Measure the bus bandwidth as defined by nccl-tests: each rank sends 2 (n-1)/n of the bytes."""
    ranks, size = distributed.world_size, BYTES[distributed.device.type]
    if ranks == 1:
        return "nothing to reduce"
    seconds = 0.0
    for repetition in range(1 + REPETITIONS):
        values = torch.full((size // 4,), float(distributed.rank + 1), device=distributed.device)
        distributed.barrier()
        started = time.perf_counter()
        _within_limit(dist.all_reduce(values, async_op=True))
        right = bool((values == ranks * (ranks + 1) / 2).all())
        # The first repetition establishes connections and is not timed.
        seconds += (time.perf_counter() - started) if repetition else 0.0
        wrong = [rank for rank, fine in enumerate(distributed.gather_objects(right)) if not fine]
        if wrong:
            raise MobiusError(f"an all-reduce returned a wrong sum on {_names(wrong, distributed.nodes)}")
    bandwidth = 2 * (ranks - 1) / ranks * size * REPETITIONS / seconds
    return f"all-reduce of {size >> 20} MiB right, {bandwidth / 1e9:.2f} GB/s"


def _within_limit(work: Any) -> None:
    try:
        work.wait(timedelta(seconds=LIMIT))
    except RuntimeError as error:
        raise MobiusError(
            f"all ranks respond, but an all-reduce did not finish within {LIMIT} s: on several nodes, check"
            f" NCCL_SOCKET_IFNAME and NCCL_IB_HCA in slurm/site.sh ({str(error).splitlines()[0]})"
        ) from error
