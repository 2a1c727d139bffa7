"""Started on several ranks by test_ranks.py: one run for each ZeRO stage, in one launch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from mobius_train import environment
from mobius_train.cli import run_rank
from mobius_train.config import load
from mobius_train.run import train


def main() -> None:
    recipe, output, ds_configs, *stages = sys.argv[1:]
    launch = environment.prepare()
    # One process group for all runs: DeepSpeed takes only one in the life of a process.
    dist.init_process_group("gloo")
    for stage in stages:
        per_rank = 4 // launch.world_size
        config = load(Path(recipe), [f"output_dir={output}/{stage}", f"train_batch_size={per_rank}"])
        train(config, Path(ds_configs) / f"{stage}.json", launch)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(main)
