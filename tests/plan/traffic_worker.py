"""One rank that counts what an optimizer step sends, in each case; rank 0 prints it as JSON.

    traffic_worker.py <ds_configs> <cases>

The cases are JSON: lists of a precision, the micro-batches of a step, and options of stage 3, with which stage 3 alone
is tried; without options all stages are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mobius_train.cli import run_rank
from mobius_train.job import environment


def main() -> None:
    launch = environment.prepare()
    import torch
    from counting import CountCollectives
    from engine_settings import settings
    from torch import nn

    from mobius_train.engine.deepspeed import DeepSpeedEngine
    from mobius_train.engine.ds_config import resolve
    from mobius_train.job.distributed import Distributed

    width = 64

    def sent(stage: int, precision: Any, accumulation: int, options: dict[str, int]) -> dict[str, int]:
        chosen = settings(gradient_accumulation_steps=accumulation, mixed_precision=precision)
        # Parameters smaller than the threshold would stay whole on every rank.
        zero = {"stage3_param_persistence_threshold": 0, **options} if stage == 3 else {}
        ds_json = json.loads((Path(sys.argv[1]) / f"zero{stage}.json").read_text())
        ds_json["zero_optimization"] |= zero
        torch.manual_seed(0)
        frozen = nn.Linear(width, width).requires_grad_(False)
        module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
        engine = DeepSpeedEngine(module, chosen, resolve(ds_json, chosen, launch.world_size), distributed)
        for _ in range(3):
            counted = CountCollectives()
            with counted:
                for _ in range(accumulation):
                    x = frozen(torch.ones(2, width)).to(engine.dtype)
                    engine.backward(engine(x).float().square().mean())
                    engine.step(1e-3)
        engine.close()
        # Of the last step: in the first ones, stage 3 gathers more, to learn the order of the layers.
        return dict(counted.bytes)

    with Distributed(launch) as distributed:
        found = [
            {stage: sent(stage, precision, accumulation, options) for stage in ([3] if options else range(4))}
            for precision, accumulation, options in json.loads(sys.argv[2])
        ]
        if distributed.is_main:
            print(json.dumps({"parameters": 8 * width * width, "bytes": found}))


if __name__ == "__main__":
    run_rank(main)
