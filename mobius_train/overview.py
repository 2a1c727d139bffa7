"""What a run is, in the lines that it prints before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mobius_train.config import RunConfig
from mobius_train.devices import device_name
from mobius_train.job.distributed import Distributed
from mobius_train.metrics.trackers.open_trackers import where_to_look
from mobius_train.run_files import LOGS

WIDTH = 12


def overview(
    config: RunConfig,
    engine: str,
    distributed: Distributed,
    output_dir: Path,
    of_task: Mapping[str, str],
    epoch: int,
    done: int,
    planned: int | None,
) -> str:
    """One line for each thing, with its name in front.

    Args:
        engine: see `Spread.describe`.
        of_task: see `Task.overview`.
        epoch: see `Task.epoch`.
        done: steps that a resumed run has behind it.
        planned: planned peak of a GPU in bytes, without the CUDA context; None if there is no plan.
    """
    batch = config.samples_per_step(distributed.world_size)
    steps = f"{config.steps} of {batch} samples: {config.steps * batch / epoch:.3g} epochs"
    lines = {
        "run": str(output_dir),
        **of_task,
        "device": _device(distributed, config),
        "engine": engine,
        "steps": steps if not done else f"{done} done of {steps}",
        **_memory(planned),
        "tracker": where_to_look(config.report_to, output_dir / LOGS),
    }
    return "\n".join(f"{name:<{WIDTH}}{text}" for name, text in lines.items())


def _memory(planned: int | None) -> dict[str, str]:
    return {} if planned is None else {"memory": f"{planned / 1e9:.2f} GB planned as the peak of each GPU"}


def _device(distributed: Distributed, config: RunConfig) -> str:
    ranks, sharing = distributed.world_size, config.sequence_parallel_size
    kind = device_name(distributed.device)
    precision = "float32" if config.mixed_precision == "no" else config.mixed_precision
    shared = f", {sharing} of which share a clip" if sharing > 1 else ""
    threads = f" ({torch.get_num_threads()} threads each)" if kind == "CPU" else ""
    return f"{ranks} x {kind}{threads}{shared}, {precision}"
