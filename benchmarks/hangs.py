"""Let a rank hang in each phase of a run, and check that all ranks end soon and name it.

    python benchmarks/hangs.py --config recipe.yaml --ranks 2 --record benchmarks/hangs.json max_train_steps=4

The recipe trains a few steps with data.cache_dir and data.validation. In each phase that has a limit (`time_limits`),
each rank hangs once: it lives, and its heartbeat goes on. All ranks must end within a minute of the limit, with an
error that names the rank and the phase, and with the stacks of all ranks. The next start, without a hang, must end with
the losses of an undisturbed run. Exits 1 on any deviation. `--kills` counts hangs; it is the number of phases by
default.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from kill_resume import losses
from killed_job import Job, add_job_arguments, run_seeds

from mobius_train.cli import run
from mobius_train.errors import MobiusError

SCRIPT = Path(__file__).with_name("hanging_main.py")
# The phases, with the times that each is entered before the last one that a short run is sure to reach.
PHASES = {"start": 3, "clip": 2, "batch": 3, "step": 3, "validation": 2, "save": 3, "export": 1}
# Seconds. The first is for the phase that hangs, the others are for phases that go well on a loaded machine.
LIMIT, WELL = 25, 900
BEYOND = 60.0
STALLED = re.compile(r"error: rank (\d+) on \S+ stalled: no progress for \S+ s \(time_limits\.(\w+)\)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job_arguments(parser)
    parser.set_defaults(kills=len(PHASES))
    return parser.parse_args()


def campaign(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Hangs in the phases in turn, each of a random rank at a random time.

    Raises:
        MobiusError: a rank lived on, the wrong one was named, or the next start differs from the undisturbed run.
    """
    chance, longest, counts = random.Random(seed), 0.0, dict.fromkeys(PHASES, 0)
    with tempfile.TemporaryDirectory(prefix="hangs-") as folder:
        whole, output, cache = Path(folder) / "whole", Path(folder) / "run", Path(folder) / "cache"
        job = Job(arguments, whole, f"data.cache_dir={cache}")
        job.finish()
        for number in range(arguments.kills):
            limit = list(PHASES)[number % len(PHASES)]
            rank, occurrence = chance.randrange(arguments.ranks), chance.randint(1, PHASES[limit])
            for left in (output, cache):
                shutil.rmtree(left, ignore_errors=True)
            seconds = _hang(arguments, output, cache, rank, limit, occurrence)
            longest = max(longest, seconds)
            counts[limit] += 1
            print(f"hang {number + 1}: rank {rank} in {limit} {occurrence}: out after {seconds:.1f} s", flush=True)
            Job(arguments, output, f"data.cache_dir={cache}", "resume_from_checkpoint=auto").finish()
            if losses(output) != losses(whole):
                raise MobiusError(f"after a hang of rank {rank} in {limit} the losses differ")
    return {
        "hangs": counts,
        "longest_beyond_the_limit_s": round(longest - LIMIT, 2),
        "named_with_stacks": arguments.kills,
        "losses_equal": True,
    }


def _hang(arguments: argparse.Namespace, output: Path, cache: Path, rank: int, limit: str, occurrence: int) -> float:
    """Seconds from the hang until all ranks had ended."""
    limits = ",".join(f"{name}: {LIMIT if name == limit else WELL}" for name in PHASES)
    job = Job(
        arguments,
        output,
        f"data.cache_dir={cache}",
        f"time_limits={{{limits}}}",
        script=(str(SCRIPT), str(rank), limit, str(occurrence)),
    )
    try:
        hangs_since = _asleep_since(job)
        codes = job.end(LIMIT + BEYOND)
    except BaseException:
        job.kill()
        raise
    seconds = time.monotonic() - hangs_since
    text = job.log.read_text()
    found = STALLED.search(text)
    if not all(codes) or found is None or found.groups() != (str(rank), limit) or "in asleep" not in text:
        raise MobiusError(f"rank {rank} hung in {limit}, and the ranks ended with {codes}:\n{text[-3000:]}")
    return seconds


def _asleep_since(job: Job) -> float:
    """The moment at which the rank hangs."""
    while "hangs now" not in job.log.read_text():
        job.check_running()
        time.sleep(0.02)
    return time.monotonic()


def main() -> None:
    arguments = parse()
    what = "hangs of a rank in each phase of a run"
    run_seeds(arguments, what, lambda seed: campaign(arguments, seed))


if __name__ == "__main__":
    run(main)
