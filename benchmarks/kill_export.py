"""Kill a run while it fills its latent cache or exports its model, start it again, and compare the results.

    python benchmarks/kill_export.py --config recipe.yaml --kills 50 --seeds 0 1 2 --ranks 2 \
        --record benchmarks/kill_export.json max_train_steps=2 checkpointing_steps=1

The recipe trains a few steps with data.cache_dir. In turn, a start is killed while it fills the cache, and while it
writes final/ of the last checkpoint, in a folder with and without an older final/. Half of the kills hit all ranks at
once, the others one rank, and the others must end by themselves. After each kill no part of a file may have a good
name: final/ must be absent, the old one or the new one. The next start must finish, and its cache and its final/ must
be bit-identical to those of an undisturbed run. Exits 1 on any deviation.
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

from mobius_train.cli import run
from mobius_train.errors import MobiusError

CACHE, FINAL = "filling the cache", "exporting"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job_arguments(parser)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds from a phase's first file to the kill")
    return parser.parse_args()


@dataclass
class Kill:
    """The circumstances and the outcome of a kill.

    Attributes:
        during: the phase.
        written: whether a file of this phase was on its way.
        rank: the killed rank; None for all.
        seconds_to_the_end: until the last rank had ended.
        old: whether the folder had an older final/.
        found: what had the good name afterwards.
    """

    during: str
    written: bool
    rank: int | None
    seconds_to_the_end: float
    old: bool
    found: str


def hashes(folder: Path) -> dict[str, str]:
    """The hash of each file below a folder that is under its own name, by relative path.

    Without the model card, which has the recipe: a start that resumes has another one.
    """
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != "README.md"
        and not any(part.startswith(".tmp-") for part in path.relative_to(folder).parts)
    }


class Campaign:
    """Kills of one recipe in a temporary folder."""

    def __init__(self, arguments: argparse.Namespace, seed: int, folder: Path) -> None:
        self._arguments, self._folder = arguments, folder
        self._chance, self._longest = random.Random(seed), arguments.longest
        self._output, self._cache = folder / "run", folder / "cache"
        self._job("max_train_steps=1").finish()
        (self._output / "final").rename(folder / "old-final")
        shutil.rmtree(self._output)
        self._job().finish()
        self._cached, self._final = hashes(self._cache), hashes(self._output / "final")
        if not self._cached or not self._final:
            raise MobiusError("the undisturbed run has no cache or no final/: is data.cache_dir used?")
        # The trained run without its model.
        self._trained = folder / "trained"
        shutil.copytree(self._output, self._trained)
        shutil.rmtree(self._trained / "final")

    def _job(self, *overrides: str) -> Job:
        return Job(self._arguments, self._output, f"data.cache_dir={self._cache}", *overrides)

    def kill(self) -> list[Kill]:
        """One kill in each phase, and what must hold after it.

        Raises:
            MobiusError: something was lost, or the next start differs from the undisturbed run.
        """
        return [self._kill_cache(), self._kill_final(old=False), self._kill_final(old=True)]

    def _kill_cache(self) -> Kill:
        self._clear(CACHE)
        kill = self._interrupt(CACHE, False, self._job())
        kill.found = f"{len(hashes(self._cache))} files"
        for name, value in hashes(self._cache).items():
            if self._cached.get(name) != value:
                raise MobiusError(f"after a kill while {CACHE}: {name} has its good name and other contents")
        self._finish(CACHE, "resume_from_checkpoint=auto")
        return kill

    def _kill_final(self, old: bool) -> Kill:
        self._clear(FINAL)
        final = self._output / "final"
        if old:
            shutil.copytree(self._folder / "old-final", final)
        before = hashes(final) if old else {}
        kill = self._interrupt(FINAL, old, self._job("resume_from_checkpoint=latest"))
        found = hashes(final) if final.is_dir() else {}
        names = {json.dumps(before): "the old one" if old else "none", json.dumps(self._final): "the new one"}
        if json.dumps(found) not in names:
            raise MobiusError(f"after a kill while {FINAL}: final/ is neither the old one nor the new one")
        kill.found = names[json.dumps(found)]
        self._finish(FINAL, "resume_from_checkpoint=latest")
        return kill

    def _clear(self, phase: str) -> None:
        shutil.rmtree(self._output, ignore_errors=True)
        if phase == CACHE:
            shutil.rmtree(self._cache, ignore_errors=True)
        else:
            shutil.copytree(self._trained, self._output)

    def _interrupt(self, phase: str, old: bool, job: Job) -> Kill:
        """Kill the job at a random time of the phase."""
        try:
            while not self._begun(phase):
                job.check_running()
                time.sleep(0.001)
            time.sleep(self._chance.choice([0.0, self._chance.uniform(0, 0.1), self._chance.uniform(0, self._longest)]))
            rank = self._chance.choice([None, self._chance.randrange(self._arguments.ranks)])
            written = self._begun(phase) and bool(list(self._folder.rglob(".tmp-*")))
            ending = job.kill(None if rank is None else [rank])
        except BaseException:
            job.kill()
            raise
        return Kill(phase, written, rank, round(ending, 3), old, "")

    def _begun(self, phase: str) -> bool:
        return self._cache.is_dir() if phase == CACHE else any(self._output.glob(".tmp-*-final"))

    def _finish(self, phase: str, *overrides: str) -> None:
        self._job(*overrides).finish()
        for name, expected in (("cache", self._cached), ("run/final", self._final)):
            if hashes(self._folder / name) != expected:
                raise MobiusError(f"after a kill while {phase}: {name} differs from the undisturbed run's")


def campaign(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The kills of a seed.

    Raises:
        MobiusError: see `Campaign.kill`.
    """
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory(prefix="kill-export-") as folder:
        kill = Campaign(arguments, seed, Path(folder)).kill
        while len(kills) < arguments.kills:
            kills += kill()
            print(f"kill {len(kills)}: {kills[-3:]}", flush=True)
    return {
        "kills": len(kills),
        "kills_with_a_file_on_its_way": sum(kill.written for kill in kills),
        "kills_of_one_rank": sum(kill.rank is not None for kill in kills),
        "longest_until_the_others_had_ended_s": max(kill.seconds_to_the_end for kill in kills),
        "final_afterwards": {
            name: sum(kill.found == name for kill in kills if kill.during == FINAL)
            for name in ("none", "the old one", "the new one")
        },
        # Anything else has ended the campaign.
        "lost_or_different": 0,
    }


def main() -> None:
    arguments = parse()
    what = "random SIGKILLs of ranks while a run fills its cache or exports its model"
    run_seeds(arguments, what, lambda seed: campaign(arguments, seed))


if __name__ == "__main__":
    run(main)
