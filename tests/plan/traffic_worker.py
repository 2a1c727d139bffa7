"""One rank that counts what an optimizer step sends, at each ZeRO stage; rank 0 prints it as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

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

    width, precision, accumulation = 64, cast(Any, sys.argv[1]), int(sys.argv[2])
    found = {}
    with Distributed(launch) as distributed:
        for stage in range(4):
            chosen = settings(gradient_accumulation_steps=accumulation, mixed_precision=precision)
            # Parameters smaller than the threshold would stay whole on every rank.
            zero = {"stage3_param_persistence_threshold": 0, **json.loads(sys.argv[4])} if stage == 3 else {}
            ds_json = json.loads((Path(sys.argv[3]) / f"zero{stage}.json").read_text())
            ds_json["zero_optimization"] |= zero
            config = resolve(ds_json, chosen, launch.world_size)
            torch.manual_seed(0)
            frozen = nn.Linear(width, width).requires_grad_(False)
            module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
            engine = DeepSpeedEngine(module, chosen, config, distributed)
            for _ in range(3):
                counted = CountCollectives()
                with counted:
                    for _ in range(accumulation):
                        x = frozen(torch.ones(2, width)).to(engine.dtype)
                        engine.backward(engine(x).float().square().mean())
                        engine.step(1e-3)
                # Of the last step: in the first ones, stage 3 gathers more, to learn the order of the layers.
                found[stage] = dict(counted.bytes)
            engine.close()
        if distributed.is_main:
            print(json.dumps({"parameters": 8 * width * width, "bytes": found}))


if __name__ == "__main__":
    run_rank(main)
