"""Started on several ranks by test_ranks.py: one run for each ZeRO stage, in one launch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mobius_train import environment
from mobius_train.config import load
from mobius_train.run import train

if __name__ == "__main__":
    recipe, output, ds_configs, *stages = sys.argv[1:]
    port = int(os.environ["MASTER_PORT"])
    launch = environment.prepare()
    for number, stage in enumerate(stages):
        # A store of its own for each run: the last one's may still be closing.
        os.environ["MASTER_PORT"] = str(port + 1 + number)
        per_rank = 4 // launch.world_size
        config = load(Path(recipe), [f"output_dir={output}/{stage}", f"train_batch_size={per_rank}"])
        train(config, Path(ds_configs) / f"{stage}.json", launch)
