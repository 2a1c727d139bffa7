"""Plan clips that several GPUs share: memory, work and bytes of each of P ranks, for the ring and for serial models.

    python benchmarks/long_clips.py --record benchmarks/long_clips.json

64 and 144 frames at 512 px and 64 frames at 1280x720, one clip, bf16, recomputed, cached latents and texts, ZeRO-2 over
the P ranks. The real models run on fake tensors, so a laptop is enough. Rows that the record contains are not planned
again, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ring_family import FAMILY
from tqdm import tqdm

from mobius_train.cli import run
from mobius_train.files import replace_file
from mobius_train.job.environment import choose_accelerator
from mobius_train.shared_files import REPOSITORY, ZERO2

RANKS = (1, 2, 4, 8)


class Size(NamedTuple):
    frames: int
    width: int
    height: int


SIZES = (Size(64, 512, 512), Size(144, 512, 512), Size(64, 1280, 720))
# By recipe: models of FAMILY. The serial model of SD3 has Vchitect's blocks.
MODELS = {"sd21": ("paper", "half", "tail-2", "serial"), "sd3_medium": ("half", "serial")}
COMMON = (
    "train_batch_size=1",
    "gradient_accumulation_steps=1",
    "global_batch_size=null",
    "gradient_checkpointing=true",
    "mixed_precision=bf16",
    # Computed before the run: tools/cache_latents.py.
    "data.cache_dir=.cache/latents",
    "data.cache_required=true",
    "data.validation=null",
    "validation.prompts=[]",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="JSON, written after every plan")
    arguments = parser.parse_args()
    choose_accelerator()
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.plan import Planner

    quiet_libraries()
    record = json.loads(arguments.record.read_text(encoding="utf-8")) if arguments.record.exists() else {"rows": []}
    done = {key(row) for row in record["rows"]}
    for recipe, models in MODELS.items():
        planner = Planner(REPOSITORY / "configs" / f"{recipe}.yaml")
        wanted = [row for row in product(models, SIZES, RANKS) if (recipe, *row) not in done]
        for model, size, ranks in tqdm(wanted, desc=recipe, unit="plan"):
            record["rows"].append(plan(planner, recipe, model, size, ranks))
            replace_file(arguments.record, json.dumps(record, indent=1) + "\n")
    show(record["rows"])


def key(row: dict[str, Any]) -> tuple[str, str, Size, int]:
    return row["recipe"], row["model"], Size(*row["size"]), row["ranks"]


def plan(planner: Any, recipe: str, model: str, size: Size, ranks: int) -> dict[str, Any]:
    """Bytes and floating point operations of one rank."""
    from mobius_train.config import load
    from mobius_train.engine.ds_config import read_ds_json
    from mobius_train.engine.spread import Spread

    bucket = f"data.buckets=[{{num_frames: {size.frames}, width: {size.width}, height: {size.height}}}]"
    overrides = (*FAMILY[model], *COMMON, f"sequence_parallel_size={ranks}", bucket)
    config = load(REPOSITORY / "configs" / f"{recipe}.yaml", overrides)
    spread = Spread.over(ranks, "deepspeed", read_ds_json(ZERO2))
    planned = planner.plan(config, spread)
    return {
        "recipe": recipe,
        "model": model,
        "size": size,
        "ranks": ranks,
        "peak": planned.peak,
        "phase": planned.phase,
        "saved": sum(planned.saved.values()),
        "flop": sum(planned.flops.values()),
        "sent": {} if planned.sent is None else planned.sent.bytes,
        "collectives": {} if planned.sent is None else planned.sent.calls,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A table in Markdown: a line for each model and size; in the columns P ranks."""
    heads = [f"{what}, P = {' / '.join(map(str, RANKS))}" for what in ("peak, GB", "saved, GB", "exchanged, GB")]
    print(f"| model | clip | {' | '.join(heads)} | TFLOP, all ranks |\n|---|---|---|---|---|---|")
    lines: dict[tuple[str, str, Size], dict[int, dict[str, Any]]] = {}
    for row in rows:
        recipe, model, size, ranks = key(row)
        lines.setdefault((recipe, model, size), {})[ranks] = row
    for (recipe, model, size), of_ranks in lines.items():
        cells = [
            " / ".join(f"{number(of_ranks[ranks]) / 1e9:.1f}" for ranks in of_ranks)
            for number in (
                lambda row: row["peak"],
                lambda row: row["saved"],
                lambda row: row["sent"].get("exchange", 0),
            )
        ]
        work = max(ranks * row["flop"] for ranks, row in of_ranks.items()) / 1e12
        clip = f"{size.frames} x {size.width}x{size.height}"
        print(f"| {recipe}, {model} | {clip} | {' | '.join(cells)} | {work:.0f} |")


if __name__ == "__main__":
    run(main)
