"""Before the models load, in seconds: are all nodes there, alike, and able to work together? Those that are not are named."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from mobius_train.config import RunConfig
from mobius_train.data.clips import source_digest
from mobius_train.engine.distributed import Distributed
from mobius_train.engine.heartbeat import name_of
from mobius_train.errors import MobiusError
from mobius_train.sources import check_local
from mobius_train.versions import versions

# Seconds. Checkpoints and logs are ordered by their times.
CLOCKS = 5.0
# NFS may take so long to show a file of another node.
SHARED = 20.0
# Bytes of the all-reduce: enough to fill the network, little enough for a moment.
BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}
REPETITIONS = 3


class Facts(NamedTuple):
    """What one rank says of itself; all but the clock must be the same everywhere."""

    alike: dict[str, str]
    """By what it is called in the message."""
    clock: float
    """Seconds since 1970, right after a barrier."""
    complaint: str
    """What this rank alone finds wrong; else empty."""


def preflight(config: RunConfig, output_dir: Path, distributed: Distributed) -> str:
    """Check all ranks against each other; returns a line about them. All ranks call it.

    Raises:
        MobiusError: ranks differ, or one cannot do its part; each is named, on all ranks alike.
    """
    started = time.monotonic()
    distributed.barrier()
    clock = time.time()
    facts = distributed.gather_objects(Facts(_alike(config), clock, _complaint(config)))
    problems = differences(facts, distributed.nodes)
    problems += _not_shared(output_dir, distributed)
    if problems:
        raise MobiusError("the nodes are not ready:\n" + "\n".join(f"  - {problem}" for problem in problems))
    bandwidth = _all_reduce(distributed)
    nodes = len(set(distributed.nodes))
    size = BYTES[distributed.device.type] >> 20
    spread = max(fact.clock for fact in facts) - min(fact.clock for fact in facts)
    return (
        f"preflight: {distributed.world_size} rank(s) on {nodes} node(s) agree on versions, commit, configuration and"
        f" data; all-reduce of {size} MiB right, {bandwidth / 1e9:.2f} GB/s; clocks within {spread:.2f} s;"
        f" {time.monotonic() - started:.1f} s"
    )


def differences(facts: list[Facts], nodes: list[str]) -> list[str]:
    """What is not the same on all ranks, and what single ranks complain of; the odd ones are named."""
    problems = []
    for what in facts[0].alike:
        values = [fact.alike[what] for fact in facts]
        usual = Counter(values).most_common(1)[0][0]
        odd = defaultdict(list)
        for rank, value in enumerate(values):
            if value != usual:
                odd[value].append(rank)
        problems += [f"{_names(ranks, nodes)}: {what} is {value}, elsewhere {usual}" for value, ranks in odd.items()]
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
    # Paths may be given by a script with the time in them, on every node alike.
    digest = hashlib.sha256(config.dump().encode()).hexdigest()[:12]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {**versions(), "CUDA": str(torch.version.cuda), "device": device, "configuration": digest}


# What each rank finds out by itself; such a check raises MobiusError.
Check = Callable[[RunConfig], None]


def _models_are_visible(config: RunConfig) -> None:
    for name in (config.pretrained_model_name_or_path, config.vae_name_or_path, config.text_encoder_name_or_path):
        if name is not None:
            check_local(name)


def _data_are_visible(config: RunConfig) -> None:
    for source in (config.data.train, config.data.validation):
        if source is not None:
            source_digest(source)


CHECKS: tuple[Check, ...] = (_models_are_visible, _data_are_visible)


def _complaint(config: RunConfig) -> str:
    found = []
    for check in CHECKS:
        try:
            check(config)
        except (MobiusError, OSError) as error:
            found.append(str(error))
    return "; ".join(found)
