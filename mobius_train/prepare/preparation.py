"""A complete preparation: passes in sequence, parts in parallel.

Any number of processes on any number of machines can work on the same output folder. The output depends only on recipe
and inputs, and the processes share nothing but files that are published atomically.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch

from mobius_train.bars import progress
from mobius_train.data.shards import INDEX, describe_shard
from mobius_train.errors import MobiusError
from mobius_train.files import publish, publish_lines, read_lines, remove_leftovers
from mobius_train.prepare import prepare_report as report
from mobius_train.prepare.listing import NO_CAPTION, RECIPE, Inputs, open_inputs
from mobius_train.prepare.part import decision_path, rows_path, run_part
from mobius_train.prepare.passes import Pass, passes
from mobius_train.prepare.recipe import PrepareConfig
from mobius_train.prepare.sources.reference import STAGE as SOURCE

ROWS, WORK = "index.jsonl", "work"


class Share(NamedTuple):
    """One of `of` processes that share the output folder. Process i starts with parts i, i + of, i + 2·of, …"""

    number: int
    of: int


ALL = Share(0, 1)


def prepare_data(config: PrepareConfig, workers: int = 1, task: Share = ALL) -> None:
    """Do all remaining work: this task's share, then the parts that other tasks have not finished.

    No task waits for another, which may be late, queued or dead. Two tasks that process the same part write identical
    files and replace them atomically, so the only cost is some duplicate work at the end of a pass.

    Raises:
        MobiusError: the folder belongs to another recipe, a source or model is missing, a worker died, or no clip is
            left.
    """
    folder = config.output_dir
    try:
        _refuse_other(config)
        if not (folder / INDEX).exists():
            _prepare(config, workers, task)
    except OSError:
        # Another task may have finished and removed the files that this one was reading.
        if not (folder / INDEX).exists():
            raise
    _tidy(folder)


def _prepare(config: PrepareConfig, workers: int, task: Share) -> None:
    # Parts run in parallel, so threads are not needed. Their sums may differ between runs, and they do not survive the
    # fork of a worker.
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    for stage in config.stages:
        stage.check()
    work = config.output_dir / WORK
    inputs = open_inputs(config, work)
    _refuse_other(config)
    for current in passes(config):
        _run_parts(config, inputs, current, workers, task)
        if current.decision is not None and not decision_path(work, current.number).exists():
            kept = (row for row in _rows(work, current.number, inputs.parts) if row["kept"])
            publish_lines(decision_path(work, current.number), sorted(current.decision.decide(kept).items()))
    _finish(config, inputs, current.number)


def _tidy(folder: Path) -> None:
    """Remove the work files of a finished output and the leftovers of killed processes."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
    remove_leftovers(folder)


def _refuse_other(config: PrepareConfig) -> None:
    """Reject an output folder of another recipe; it belongs to a recipe once its inputs are listed."""
    folder = config.output_dir
    path = next((p for p in (folder / RECIPE, folder / WORK / RECIPE) if p.exists()), None)
    if path is None:
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
        if others and not (folder / WORK / RECIPE).exists():  # another task may have listed meanwhile
            raise MobiusError(f"the output folder {folder} contains {others[0]}: set another output_dir")
        return
    recorded = path.read_text(encoding="utf-8")
    if recorded != config.dump():
        theirs, ours = recorded.splitlines(), config.dump().splitlines()
        differing = next((line for line in ours if line not in theirs), next((x for x in theirs if x not in ours), ""))
        raise MobiusError(
            f"{folder} was started with another recipe ({path}; one difference: {differing.strip()!r}):"
            " continue with that recipe, or set another output_dir"
        )


_shared: dict[str, Any] = {}


def _do(part: int) -> int:
    """Process a part in a worker, which inherits `_shared` through the fork."""
    return run_part(part=part, **_shared)


def _run_parts(config: PrepareConfig, inputs: Inputs, current: Pass, workers: int, task: Share) -> None:
    """Run the pass until every part is done."""
    _shared.update(config=config, work=config.output_dir / WORK, inputs=inputs, current=current)
    own = range(task.number, inputs.parts, task.of)
    others = [part for part in range(inputs.parts) if part not in own]
    # Each task has its own order, so two tasks rarely process the same part.
    random.Random(task.number).shuffle(others)
    title = f"pass {current.number + 1}/{len(passes(config))}: {' '.join(s.name for s in current.stages) or 'shards'}"
    _run(inputs, current, workers, own, title)
    _run(inputs, current, workers, others, f"{title} (of other tasks)")


def _run(inputs: Inputs, current: Pass, workers: int, parts: Sequence[int], title: str) -> None:
    missing = [part for part in parts if not rows_path(_shared["work"], current.number, part).exists()]
    total = sum(inputs.size(part) for part in parts)
    done = total - sum(inputs.size(part) for part in missing)
    if not missing:
        return
    with progress(total=total, initial=done, desc=title, unit="input", smoothing=0.1) as bar:
        if workers == 1:
            for part in missing:
                bar.update(_do(part))
            return
        try:
            # A spawned process would import everything again.
            with ProcessPoolExecutor(workers, get_context("fork")) as pool:
                running: set[Future[int]] = set()
                waiting = iter(missing)
                while True:
                    running |= {pool.submit(_do, part) for part in islice(waiting, 2 * workers - len(running))}
                    if not running:
                        break
                    ready, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in ready:
                        bar.update(future.result())
        except BrokenProcessPool as error:
            raise MobiusError(
                "a worker died, most likely out of memory: restart with fewer --workers to resume"
            ) from error


def _rows(work: Path, number: int, parts: int) -> Iterator[dict[str, Any]]:
    for part in range(parts):
        yield from ({**row, "part": part} for row in read_lines(rows_path(work, number, part)))


def _about_captions(config: PrepareConfig, counts: report.Counts) -> str:
    """The end of a message about dropped clips: how to give captions; empty if none was missing in a source."""
    if NO_CAPTION not in counts.dropped.get(SOURCE, {}):
        return ""
    required = (number for number, source in enumerate(config.sources) if source.captions == "required")
    fields = " ".join(f"sources.{number}.captions=optional" for number in required)
    # The inputs are listed once, and a folder belongs to one recipe.
    return (
        f". Add a.txt beside a.mp4, or set {fields} and add a stage caption (docs/data.md); then remove"
        f" {config.output_dir} and start again"
    )


def _finish(config: PrepareConfig, inputs: Inputs, last: int) -> None:
    """Write the index and the report; index.json is written last and marks the output as complete."""
    folder = config.output_dir
    publish_lines(folder / ROWS, _rows(folder / WORK, last, inputs.parts))
    counts = report.count(config, read_lines(folder / ROWS))
    report.write(config, counts, inputs, folder / ROWS)
    if not counts.kept:
        raise MobiusError(
            f"all clips of {inputs.count} inputs were dropped: {counts.summary()}; see {folder / report.FOLDER}"
            f"{_about_captions(config, counts)}"
        )
    shards = {path.name: describe_shard(path)._asdict() for path in sorted(folder.glob("[!.]*.tar"))}
    publish(folder / RECIPE, lambda temporary: temporary.write_text(config.dump(), encoding="utf-8"))
    content = {"shards": shards, "inputs": inputs.count, "kept": counts.kept, "dropped": counts.dropped}
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    publish(folder / INDEX, lambda temporary: temporary.write_text(text, encoding="utf-8"))
