"""Started on several ranks: runs of a recipe one after the other, in one launch.

    ranks_worker.py <recipe> <output> <ds_configs> <run> [<run>...]

A run is <engine>[+key=value...], its folder <output>/<run>, and an engine a file of <ds_configs>, or fsdp.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from mobius_train.cli import run_rank
from mobius_train.config import load
from mobius_train.engine.spread import spread_of
from mobius_train.job import environment
from mobius_train.run import train


def main() -> None:
    recipe, output, ds_configs, *runs = sys.argv[1:]
    launch = environment.prepare()
    # One process group for all runs: DeepSpeed takes only one in the life of a process.
    dist.init_process_group("gloo")
    for run in runs:
        engine, *overrides = run.split("+")
        per_rank = 4 // launch.world_size
        config = load(Path(recipe), [f"output_dir={output}/{run}", f"train_batch_size={per_rank}", *overrides])
        if engine == "fsdp":
            train(config, spread_of("fsdp", None, launch))
        else:
            train(config, spread_of("deepspeed", Path(ds_configs) / f"{engine}.json", launch))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(main)
