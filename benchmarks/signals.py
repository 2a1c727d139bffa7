"""Ask a run to stop at random times of its start, its training, its saves and its end, and compare the result.

    python benchmarks/signals.py --config recipe.yaml --kills 50 --seeds 0 1 2 --ranks 2 \
        --record benchmarks/signals.json checkpointing_steps=3 max_train_steps=12

Each signal is SIGTERM, SIGUSR1 or SIGINT (Ctrl-C), for all ranks or for one. All ranks must end with the code of a
stop, 75, and with a whole checkpoint of the last step that was taken, or before the first step of the start; or the run
ends as if there had been no signal, if it comes too late to stop anything. A signal in the first seconds, before the
program can handle it, may end a rank by its default action. The next start resumes from there. Losses and final
weights of every run that ends are bit-identical to the undisturbed one's. Exits 1 on any deviation.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kill_resume import hashes, last_step, losses
from killed_job import Job, add_job_arguments, run_seeds

from mobius_train.checkpoint.folders import TEMPORARY, checkpoints
from mobius_train.checkpoint.format import step_of
from mobius_train.checkpoint.verify import problems
from mobius_train.cli import run
from mobius_train.errors import MobiusError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A step, a save and the exit of all ranks on a loaded machine.
LEAVE = 180.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job_arguments(parser)
    return parser.parse_args()


def campaign(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The signals of one seed, and what followed from them.

    Raises:
        MobiusError: a step was lost, a rank ended otherwise, or a run differs from the undisturbed one.
    """
    chance, outcomes = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="signals-") as folder:
        whole, output = Path(folder) / "whole", Path(folder) / "run"
        job = Job(arguments, whole)
        while job.running and not last_step(whole):
            time.sleep(0.01)
        startup = job.seconds
        job.finish()
        expected, steps = (losses(whole), hashes(whole)), last_step(whole)
        sent = 0
        while sent < arguments.kills or output.exists():
            resume = "resume_from_checkpoint=auto"
            job = Job(arguments, output, resume)
            try:
                if sent < arguments.kills:
                    when = _wait(job, output, chance, startup, steps)
                    number, rank = chance.choice(SIGNALS), chance.choice([None, chance.randrange(arguments.ranks)])
                    # A rank that has not joined may be killed by it; a launcher sends it to all.
                    early = job.seconds < startup
                    rank = None if early else rank
                    job.send(number, None if rank is None else [rank])
                    sent += 1
                else:
                    when, number, early = "none", signal.SIGTERM, False
                codes = job.end(LEAVE if when != "none" else 3600)
            except BaseException:
                job.send(signal.SIGKILL)
                raise
            outcome = _judge(output, codes, number, early, job)
            if when != "none":
                outcomes[f"{when}: {outcome}"] += 1
                print(f"signal {sent}: {number.name} {when}, rank {rank}: {outcome} {codes}", flush=True)
            if outcome == "ended":
                if (losses(output), hashes(output)) != expected:
                    raise MobiusError(f"seed {seed}: after signal {sent} the run differs from the undisturbed one")
                shutil.rmtree(output)
    return {"signals": sent, "outcomes": dict(sorted(outcomes.items())), "lost_steps": 0, "all_ends_equal": True}


def _wait(job: Job, output: Path, chance: random.Random, startup: float, steps: int) -> str:
    """Wait for a random time of a phase, or for the end of the run."""
    when = chance.choices(["starting", "training", "saving", "ending"], [0.3, 0.3, 0.2, 0.2])[0]
    begun = last_step(output)
    if when == "starting":
        until = chance.uniform(0, 1) * startup
        while job.running and job.seconds < until:
            time.sleep(0.005)
        return when
    target = steps if when == "ending" else min(steps, begun + chance.choice([1, 1, 2, 3]))
    while job.running and last_step(output) < max(target, begun + 1 if begun < steps else steps):
        time.sleep(0.005)
    while when == "saving" and job.running and last_step(output) < steps and not list(output.glob(TEMPORARY)):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 2.0 if when == "ending" else 0.3))
    return when


def _judge(output: Path, codes: list[int], number: signal.Signals, early: bool, job: Job) -> str:
    """What became of the run.

    Raises:
        MobiusError: a rank ended otherwise than by a stop or well, or a step that was taken is in no checkpoint.
    """
    if not any(codes):
        return "ended"
    text = job.log.read_text()[-3000:]
    stop = (os.EX_TEMPFAIL, *((-number, 1) if early else ()))
    if any(code not in stop for code in codes):
        raise MobiusError(f"after {number.name} the ranks ended with {codes}:\n{text}")
    damaged = [folder for folder in checkpoints(output) if problems(folder)] if output.exists() else []
    saved = max((step_of(folder) for folder in checkpoints(output)), default=0) if output.exists() else 0
    if damaged or saved != last_step(output):
        raise MobiusError(f"{last_step(output)} steps were taken, {saved} are saved, {damaged} are damaged:\n{text}")
    return "stopped and saved" if saved else "stopped before the first step"


def main() -> None:
    arguments = parse()
    what = "signals to ranks at random times of a run against an undisturbed run"
    run_seeds(arguments, what, lambda seed: campaign(arguments, seed))


if __name__ == "__main__":
    run(main)
