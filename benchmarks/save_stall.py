"""Training delay due to saves: steps during a save and without one, the save itself, and the bare copy.

    python benchmarks/save_stall.py --record benchmarks/save_stall.json [--steps 20] [key=value ...]

In one run of the recipe, every fourth step saves. The output contains medians and ratios of that run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from mobius_train.checkpoint.shard import PinnedCopy
from mobius_train.cli import add_deepspeed_option, run_rank
from mobius_train.config import load
from mobius_train.job import environment
from mobius_train.shared_files import REPOSITORY


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe")
    add_deepspeed_option(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--record", type=Path, help="the JSON to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    launch = environment.prepare()
    from mobius_train.checkpoint.saver import Saver
    from mobius_train.engine.spread import spread_of
    from mobius_train.run import train
    from mobius_train.trainer import Trainer

    stalls: list[float] = []
    copies: list[float] = []
    busy: list[float] = []
    quiet: list[float] = []
    save, step = Saver.save, Trainer._step

    def timed_save(self: Saver, progress: dict[str, Any]) -> float:
        pieces, copy = self._engine.pieces(), PinnedCopy()
        copy.take(pieces)
        started = perf_counter()
        copy.take(pieces)
        copies.append(perf_counter() - started)
        stalls.append(save(self, progress))
        return stalls[-1]

    def timed_step(self: Trainer, batches: Any) -> dict[str, float]:
        on_its_way = self.saver._save is not None
        started = perf_counter()
        metrics = step(self, batches)
        (busy if on_its_way else quiet).append(perf_counter() - started)
        return metrics

    Saver.save, Trainer._step = timed_save, timed_step  # type: ignore[method-assign]
    overrides = [
        "checkpointing_steps=4",
        "checkpoints_total_limit=1",
        "validation.prompts=[]",
        "validation.max_clips=4",
    ]
    overrides += [f"max_train_steps={arguments.steps}", "lr_warmup_steps=0", f"output_dir={output}"]
    spread = spread_of("deepspeed", arguments.deepspeed, launch)
    train(load(arguments.config, [*overrides, *arguments.overrides]), spread)
    size = sum(path.stat().st_size for path in next(output.glob("checkpoint-*")).iterdir())
    # The first save and the first step include allocations and other initialisation.
    steady, usual = stalls[1:], quiet[1:]
    return {
        "checkpoint_mb": size / 1e6,
        "saves": len(stalls),
        "first_save_seconds": stalls[0],
        "save_seconds": median(steady),
        "copy_seconds": median(copies),
        "step_seconds": median(usual),
        "step_seconds_while_one_is_written": median(busy),
        "save_over_copy": median(steady) / median(copies),
        "save_over_step": median(steady) / median(usual),
        "step_while_written_over_step": median(busy) / median(usual),
    }


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="save-stall-") as folder:
        results = measure(arguments, Path(folder) / "run")
    print(json.dumps(results, indent=1))
    if arguments.record:
        from mobius_train.job.versions import versions

        machine = {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()}
        record = {"what": "saves beside training, on one rank", "results": results, "overrides": arguments.overrides}
        record |= {"config": arguments.config.name, "machine": machine, "versions": versions()}
        arguments.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_rank(main)
