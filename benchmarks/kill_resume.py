"""Kill a run at random times, including saves, resume it, and compare its result with an uninterrupted run.

    python benchmarks/kill_resume.py --config recipe.yaml --kills 50 --seeds 0 1 2 --ranks 2 \
        --record benchmarks/kill_resume.json checkpointing_steps=1 max_train_steps=400

A third of the kills come during a checkpoint write, a few during the start, the others after a random time. Half of
them hit all ranks at once, the others one rank, and the others must end by themselves. After each kill the run must
resume from the last or last-but-one complete checkpoint. At the end, losses and final weights must be bit-identical to
the uninterrupted run. Exits 1 on any deviation. `kill_export.py` has the kills during the export and the cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from killed_job import Job, add_job_arguments, run_seeds

from mobius_train.checkpoint.folders import TEMPORARY, checkpoints
from mobius_train.checkpoint.format import step_of
from mobius_train.checkpoint.verify import problems
from mobius_train.cli import run
from mobius_train.errors import MobiusError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job_arguments(parser)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds from a start's first step to its kill")
    return parser.parse_args()


@dataclass
class Kill:
    """The circumstances and the outcome of a kill."""

    when: str
    seconds_after_start: float
    steps_done: int
    save_was_on_its_way: bool
    whole_checkpoints: list[int]
    damaged_checkpoints: list[int]
    rank: int | None
    """The killed rank; None for all."""
    seconds_to_the_end: float
    """Until the last rank had ended."""
    resumed_from: int | None = None


def lines(output: Path) -> list[str]:
    path = output / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_step(job: Job, output: Path, taken: int) -> None:
    """Wait for a step beyond the first step of all earlier starts, so that every start makes progress."""
    while last_step(output) <= taken or (job.resumed_from() is None and taken > 0):
        job.check_running()
        time.sleep(0.01)


def kill_once(
    job: Job, output: Path, begun: int, chance: random.Random, arguments: argparse.Namespace, startup: float
) -> Kill:
    """Kill all ranks or one after a random time."""
    when = chance.choices(["saving", "running", "starting"], [0.35, 0.55, 0.1])[0]
    if when == "starting":
        until = chance.uniform(0.2, 1.0) * startup
        while job.seconds < until:
            job.check_running()
            time.sleep(0.005)
    else:
        wait_for_step(job, output, begun)
        until = job.seconds + chance.uniform(0, arguments.longest)
        while job.seconds < until:
            job.check_running()
            time.sleep(0.002)
        while when == "saving" and not list(output.glob(TEMPORARY)):
            job.check_running()
        if when == "saving":
            time.sleep(chance.choice([0, 0.001, 0.005, 0.02]))
    on_its_way = bool(list(output.glob(TEMPORARY)))
    seconds = job.seconds
    rank = chance.choice([None, chance.randrange(arguments.ranks)])
    ending = job.kill(None if rank is None else [rank])
    damaged = [folder for folder in checkpoints(output) if problems(folder)]
    whole = [step_of(folder) for folder in checkpoints(output) if folder not in damaged]
    broken = [step_of(folder) for folder in damaged]
    return Kill(when, round(seconds, 3), last_step(output), on_its_way, whole, broken, rank, round(ending, 3))


def interrupted(arguments: argparse.Namespace, output: Path, startup: float, seed: int) -> list[Kill]:
    """Kill and resume the requested number of times, then let the run finish."""
    chance = random.Random(seed)
    kills: list[Kill] = []
    while len(kills) <= arguments.kills:
        whole = kills[-1].whole_checkpoints if kills else []
        if not whole:
            # A run killed before its first checkpoint has nothing to resume from.
            shutil.rmtree(output, ignore_errors=True)
        job = Job(arguments, output, *(["resume_from_checkpoint=latest"] if whole else []))
        begun = whole[-1] if whole else 0
        try:
            if len(kills) == arguments.kills:
                job.finish()
                _resumed(kills, job)
                return kills
            kill = kill_once(job, output, begun, chance, arguments, startup)
        except BaseException:
            job.kill()
            raise
        _resumed(kills, job)
        kills.append(kill)
        print(f"kill {len(kills)}: {kill}", flush=True)
    return kills


def _resumed(kills: list[Kill], job: Job) -> None:
    """Record the checkpoint that the start after the last kill resumed from, unless that start was killed first."""
    if kills and kills[-1].whole_checkpoints:
        kills[-1].resumed_from = job.resumed_from()


def last_step(output: Path) -> int:
    """The last step that was taken."""
    steps = [json.loads(line)["step"] for line in lines(output) if line.endswith("}")]
    return max(steps, default=0)


def hashes(output: Path) -> dict[str, str]:
    """Of the model's files in final/."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((output / "final").rglob("*.safetensors"))
    }


def losses(output: Path) -> list[Any]:
    """Steps with their losses."""
    return [(line["step"], line["loss"]) for line in map(json.loads, lines(output)) if "loss" in line]


def campaign(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The kills of one run, and what followed from them.

    Raises:
        MobiusError: the run ended otherwise than the uninterrupted one.
    """
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        job = Job(arguments, whole)
        wait_for_step(job, whole, 0)
        startup = job.seconds
        job.finish()
        kills = interrupted(arguments, parts, startup, seed)
        expected, final = losses(whole), hashes(whole)
        same_losses, same_weights = losses(parts) == expected, bool(final) and hashes(parts) == final
    resumed = [kill for kill in kills if kill.resumed_from is not None]
    results = {
        "kills": len(kills),
        "steps": len(expected),
        "kills_of_one_rank": sum(kill.rank is not None for kill in kills),
        "longest_until_the_others_had_ended_s": max((kill.seconds_to_the_end for kill in kills), default=0.0),
        "kills_with_a_save_on_its_way": sum(kill.save_was_on_its_way for kill in kills),
        "kills_before_the_first_checkpoint": sum(not kill.whole_checkpoints for kill in kills),
        "damaged_checkpoints_under_a_good_name": sum(len(kill.damaged_checkpoints) for kill in kills),
        "resumed_from_the_last": sum(kill.resumed_from == kill.whole_checkpoints[-1] for kill in resumed),
        "resumed_from_the_last_but_one": sum(kill.resumed_from in kill.whole_checkpoints[-2:-1] for kill in resumed),
        "killed_again_before_resuming": sum(
            kill.resumed_from is None and bool(kill.whole_checkpoints) for kill in kills
        ),
        "resumed_from_another": sum(kill.resumed_from not in kill.whole_checkpoints[-2:] for kill in resumed),
        "losses_equal": same_losses,
        "final_weights_equal": same_weights,
    }
    good = same_losses and same_weights and not results["resumed_from_another"]
    if not good or results["damaged_checkpoints_under_a_good_name"]:
        raise MobiusError(
            f"seed {seed}: the interrupted run differs from the uninterrupted run:\n{json.dumps(results, indent=1)}"
        )
    return results


def main() -> None:
    arguments = parse()
    what = "random SIGKILLs of ranks against an uninterrupted run"
    run_seeds(arguments, what, lambda seed: campaign(arguments, seed))


if __name__ == "__main__":
    run(main)
