"""Count how the cost of a step grows with frames, resolution, batch and ranks, and the memory of a rank with clips.

    python benchmarks/growth.py --record benchmarks/growth.json

Memory and work of a step are planned on fake tensors, traffic is computed, and lists of clips are made with synthetic
entries in the real classes, each in a process of its own. It needs no GPU and no data, but 8 GB of memory. The record
and the tables of docs/scaling.md contain counts alone; seconds are printed, and are valid only on an idle machine. Rows
that the record contains are not made again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from fit_table import renewed
from tqdm import tqdm

from mobius_train.cli import run
from mobius_train.errors import MobiusError
from mobius_train.files import replace_file
from mobius_train.job.environment import choose_accelerator
from mobius_train.shared_files import REPOSITORY, ZERO2

PAGE = REPOSITORY / "docs" / "scaling.md"
MARKS = ("<!-- growth tables: made by benchmarks/growth.py -->", "<!-- end of the growth tables -->")
RECIPES = ("sd21", "paper_sd21")
# The sizes that grow, each from the smallest while the others stay at their smallest.
GROWING = {
    "frames": ("data.num_frames", (8, 16, 32)),
    "pixels of a side": ("data.resolution", (256, 512)),
    "clips of a micro-batch": ("train_batch_size", (1, 2, 4)),
}
COSTS = {"flop": ("TFLOP", 1e12), "saved": ("saved, GB", 1e9), "peak": ("peak, GB", 1e9)}
RANKS = (2, 8, 64, 512)
STAGES = (0, 1, 2, 3)
CLIPS = (10_000, 1_000_000, 10_000_000)
CLIPS_OF_A_SHARD = 1000
BATCH = 256  # clips of a global batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON, written after every row")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="the Markdown file to update (default: docs/scaling.md)"
    )
    parser.add_argument(
        "--clips", type=int, nargs="+", default=CLIPS, metavar="N", help="lengths of the lists of clips"
    )
    parser.add_argument("--list-of", type=int, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    choose_accelerator()
    if arguments.list_of is not None:
        print(json.dumps(list_of_clips(arguments.list_of)))
        return
    if arguments.record is None:
        raise MobiusError("give --record FILE")
    record: dict[str, Any] = {"work": [], "ranks": [], "clips": []}
    if arguments.record.exists():
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
    for _ in rows(record, arguments.clips):
        replace_file(arguments.record, json.dumps(record, indent=1) + "\n")
    page = arguments.page.read_text(encoding="utf-8")
    replace_file(arguments.page, renewed(page, "\n".join(tables(record)), MARKS))


def rows(record: dict[str, Any], clips: list[int]) -> Iterator[None]:
    """Add the rows that the record lacks; yields after each."""
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.plan import Planner
    from mobius_train.plan.traffic import traffic

    quiet_libraries()
    for recipe in RECIPES:
        planner = Planner(REPOSITORY / "configs" / f"{recipe}.yaml")
        done = {(row["size"], row["value"]) for row in record["work"] if row["recipe"] == recipe}
        wanted = [(size, value) for size, (_, values) in GROWING.items() for value in values]
        for size, value in tqdm(wanted, desc=recipe, unit="plan"):
            if (size, value) not in done:
                record["work"].append(
                    {"recipe": recipe, "size": size, "value": value} | work(planner, recipe, size, value)
                )
                yield
    trained = {row["recipe"]: row["trained"] for row in record["work"]}
    record["ranks"] = [
        {"recipe": recipe, "stage": stage, "ranks": ranks, "sent": round(found.sent(ranks))}
        for recipe in RECIPES
        for stage in STAGES
        for found in [traffic(trained[recipe], stage, accumulation=1)]
        for ranks in RANKS
    ]
    yield
    done = {row["clips"] for row in record["clips"]}
    for count in tqdm([count for count in clips if count not in done], unit="list"):
        command = [sys.executable, __file__, "--list-of", str(count)]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        print(f"{count} clips, seconds: {found.pop('seconds')}", flush=True)
        record["clips"].append({"clips": count} | found)
        yield


def work(planner: Any, recipe: str, size: str, value: int) -> dict[str, Any]:
    """Floating point operations and bytes of a micro-batch on one GPU, with cached latents."""
    from mobius_train.config import load
    from mobius_train.engine.ds_config import read_ds_json
    from mobius_train.engine.spread import Spread

    smallest = [f"{field}={value if name == size else values[0]}" for name, (field, values) in GROWING.items()]
    fixed = ("gradient_accumulation_steps=1", "global_batch_size=null", "data.validation=null", "validation.prompts=[]")
    cached = ("data.cache_dir=.cache/latents", "data.cache_required=true")
    config = load(REPOSITORY / "configs" / f"{recipe}.yaml", [*smallest, *fixed, *cached])
    planned = planner.plan(config, Spread.over(1, ds_json=read_ds_json(ZERO2)))
    return {
        "flop": sum(planned.flops.values()),
        "saved": sum(planned.saved.values()),
        "peak": planned.peak,
        "trained": planned.trained,
    }


def list_of_clips(count: int) -> dict[str, Any]:
    """Bytes that a rank keeps of a list of clips and of its order, and processor seconds to make and to use them."""
    from mobius_train.data.buckets import Shape, batch_shares, clips_by_bucket
    from mobius_train.data.captions import Caption
    from mobius_train.data.clips import ClipDataset
    from mobius_train.data.entry import Entry
    from mobius_train.data.entry_list import EntryList
    from mobius_train.data.order import BucketOrder, clip_of
    from mobius_train.data.packed import Coded

    clock, memory = _Clock(), _Memory()
    shapes = [Shape(16, 512, 512), Shape(16, 640, 384), Shape(8, 256, 256)]

    paths = [Path(f"/data/clips/train-{shard:06d}.tar") for shard in range(-(-count // CLIPS_OF_A_SHARD))]

    def entry(number: int) -> Entry:
        path = paths[number // CLIPS_OF_A_SHARD]
        caption = Caption(f"a person walks along the beach while the sun sets, number {number}")
        place = number % CLIPS_OF_A_SHARD * 500_000
        return Entry(f"{number:09d}", (caption,), path, place, 499_000, ".mp4", f"{path}/{number:09d}.mp4")

    entries = EntryList(map(entry, range(count)))
    clips = ClipDataset(entries, num_frames=16, resolution=512, found="")
    clock.note("index")
    index = memory.grown()
    clock.start()
    sent = len(pickle.dumps(entries))
    clock.note("pickle")
    # As a run that continues in the middle of its third epoch.
    seen = 2 * count + count // 2
    clip_of(seen, count, seed=0)
    clock.note("order")
    order = memory.grown()
    clock.start()
    for sample in range(seen, seen + BATCH):
        clip_of(sample, count, seed=0)
    clock.note("step")
    bucketed = clips.in_buckets(shapes, Coded(shapes[number % len(shapes)] for number in range(count)))
    assert bucketed.shapes is not None
    numbers = clips_by_bucket(bucketed.shapes)
    buckets = BucketOrder(numbers, batch_shares({shape: len(n) for shape, n in numbers.items()}, {}), BATCH, seed=0)
    for batch in range(len(shapes)):
        buckets(seen // BATCH * BATCH + batch * BATCH)
    clock.note("buckets")
    del numbers
    in_buckets = memory.grown()
    clock.start()
    for sample in range(seen // BATCH * BATCH, seen // BATCH * BATCH + BATCH):
        buckets(sample)
    clock.note("step in buckets")
    return {"index": index, "sent": sent, "order": order, "buckets": in_buckets, "seconds": clock.seconds}


class _Clock:
    """Processor seconds since the last note or start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def note(self, name: str) -> None:
        self.seconds[name] = round(time.process_time() - self._last, 4)
        self.start()

    def start(self) -> None:
        self._last = time.process_time()


class _Memory:
    """Growth of the resident memory between calls, in bytes."""

    def __init__(self) -> None:
        self._last = self._resident()

    def grown(self) -> int:
        now = self._resident()
        grown, self._last = now - self._last, now
        return grown

    def _resident(self) -> int:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def exponent(small: dict[str, Any], large: dict[str, Any], cost: str, size: str) -> float:
    """The power of the size that the cost grows with, between two rows."""
    return math.log(large[cost] / small[cost]) / math.log(large[size] / small[size])


def tables(record: dict[str, Any]) -> Iterator[str]:
    """The lines of the tables, as Markdown."""
    names = [name for name, _ in COSTS.values()]
    yield f"| recipe, what grows | values | {' | '.join(names)} | powers |"
    yield "|---" * (3 + len(names)) + "|"
    for recipe in RECIPES:
        for size in GROWING:
            found = [row for row in record["work"] if (row["recipe"], row["size"]) == (recipe, size)]
            cells = [" / ".join(f"{row[cost] / unit:.3g}" for row in found) for cost, (_, unit) in COSTS.items()]
            powers = [f"{exponent(found[-2], found[-1], cost, 'value'):.2f}" for cost in COSTS]
            values = " / ".join(str(row["value"]) for row in found)
            yield f"| {recipe}, {size} | {values} | {' | '.join(cells)} | {', '.join(powers)} |"
    yield ""
    yield f"| GB sent by a rank in a step | {' | '.join(f'{ranks} ranks' for ranks in RANKS)} |"
    yield "|---" * (1 + len(RANKS)) + "|"
    for stage in STAGES:
        cells = [
            f"{row['sent'] / 1e9:.2f}" for row in record["ranks"] if (row["recipe"], row["stage"]) == ("sd21", stage)
        ]
        yield f"| sd21, ZeRO-{stage} | {' | '.join(cells)} |"
    yield ""
    yield "| clips | list of clips | its order | with buckets | exchanged at the start |"
    yield "|---|---|---|---|---|"
    for row in sorted(record["clips"], key=itemgetter("clips")):
        cells = [f"{row[name] / 1e6:.1f} MB" for name in ("index", "order", "buckets", "sent")]
        yield f"| {row['clips']:,} | {' | '.join(cells)} |"


if __name__ == "__main__":
    run(main)
