"""Compare the time of an optimizer step between models, in turn, on one rank of this machine.

    python benchmarks/step_time.py --record benchmarks/step_time_cpu.json --picture benchmarks/step_time_cpu.png

Each variant runs some steps in a process of its own, then the next one, and so on for several rounds, so that a change
of the machine's speed meets all of them. A round also measures the machine's speed at matrix products. Printed are
medians over the rounds, ratios to the serial model, the share of the machine's speed that a step achieves, and the peak
of a process: allocated on a GPU, otherwise resident.
Rounds that the record contains are not measured again, so an interrupted run continues. Times are valid only on an
otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ring_family import FAMILY
from step_picture import draw
from tqdm import tqdm

from mobius_train.cli import add_engine_options, deepspeed_json, run
from mobius_train.errors import MobiusError
from mobius_train.files import replace_file
from mobius_train.job.environment import choose_accelerator
from mobius_train.measure.side_by_side import WORKER
from mobius_train.shared_files import REPOSITORY

RECOMPUTED = "gradient_checkpointing=true"
# What the frozen branch can do for its speed, and for memory in int8. Some of it is for CUDA GPUs alone.
FROZEN = {
    "compiled": ("frozen_compile=true",),
    "channels_last": ("frozen_channels_last=true",),
    "compiled channels_last": ("frozen_compile=true", "frozen_channels_last=true"),
    "graphs": ("frozen_compile=true", "frozen_cuda_graphs=true"),
    "ahead": ("frozen_ahead=true",),
    "compiled ahead": ("frozen_compile=true", "frozen_ahead=true"),
    "int8": ("frozen_int8=true",),
    "compiled int8": ("frozen_compile=true", "frozen_int8=true"),
}
BY_DEFAULT = FAMILY | {
    f"{name} recomputed": (*FAMILY[name], RECOMPUTED) for name in ("serial", "paper", "half", "quarter", "tail-2")
}
VARIANTS = BY_DEFAULT | {
    f"{name}, frozen {how}": (*FAMILY[name], *fields) for name in ("half", "tail-2") for how, fields in FROZEN.items()
}
REFERENCE = "serial"


class Variant(NamedTuple):
    """Fields of the recipe, and the program that measures them."""

    overrides: tuple[str, ...]
    program: tuple[str, ...] = WORKER
    on_any_device: bool = True


def parse(description: str | None, variants: Mapping[str, Variant]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="JSON, written after every measurement")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe (YAML)")
    add_engine_options(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=variants,
        default=[name for name, variant in variants.items() if variant.on_any_device],
        metavar="NAME",
        # Names contain spaces and commas.
        help=f"some of: {shlex.join(variants)} (default: those that run on any device)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that each variant is measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps of a process that do not count")
    parser.add_argument("--steps", type=int, default=5, help="steps of a process that count")
    parser.add_argument("--picture", type=Path, help="draw the seconds of a step by part (PNG, SVG or PDF)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    return parser.parse_intermixed_args()


def main() -> None:
    variants = {name: Variant(fields, on_any_device=name in BY_DEFAULT) for name, fields in VARIANTS.items()}
    compare(__doc__, variants)


def compare(description: str | None, variants: Mapping[str, Variant]) -> None:
    """Measure the variants in turn, write the record, and print its table.

    Raises:
        MobiusError: the options are impossible, the record is of other settings, or a variant cannot be measured.
    """
    arguments = parse(description, variants)
    for name in ("rounds", "steps"):
        if getattr(arguments, name) < 1:
            raise MobiusError(f"--{name} {getattr(arguments, name)}: it must be at least 1")
    if arguments.picture:
        # Imports torch, which takes seconds.
        from mobius_train.plan.picture import check_picture

        check_picture(arguments.picture)
    choose_accelerator()
    settings: dict[str, Any] = {
        "config": name_of(arguments.config),
        "overrides": arguments.overrides,
        "warmup": arguments.warmup,
        "steps": arguments.steps,
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "system": platform.platform()},
    }
    if gpu := gpu_name():
        settings["machine"]["gpu"] = gpu
    record = read(arguments.record, settings)
    wanted = [(number, name) for number in range(arguments.rounds) for name in arguments.variants]
    failed: dict[str, MobiusError] = {}
    for number, name in tqdm(wanted, unit="run"):
        if name in failed or len(record["measured"].get(name, [])) > number:
            continue
        try:
            measured = measure(name, variants[name], arguments)
        except MobiusError as error:
            # The others are measured all the same.
            failed[name] = error
            tqdm.write(str(error), file=sys.stderr)
            continue
        measured["matrix_flops"] = matrix_flops(arguments.overrides)
        record["measured"].setdefault(name, []).append(measured)
        record["table"] = table(record["measured"])
        replace_file(arguments.record, json.dumps(record, indent=1) + "\n")
    show(record["table"])
    if arguments.picture and record["table"]:
        draw(record["table"], arguments.picture)
    if failed:
        raise MobiusError("\n".join(["not measured:", *(f"  - {error}" for error in failed.values())]))


def gpu_name() -> str | None:
    """The name of the GPU that a process of one rank takes; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def name_of(config: Path) -> str:
    """The path of a recipe, in the repository if it lies there."""
    path = config.resolve()
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


def read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record to continue, or a new one.

    Raises:
        MobiusError: it is of other settings.
    """
    if not path.exists():
        return settings | {"measured": {}, "table": []}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name, value in settings.items() if record.get(name) != value]
    if other:
        raise MobiusError(f"{path} was measured with another {', '.join(other)}: choose another --record or remove it")
    return record


def measure(name: str, variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of one variant in a process of its own.

    Raises:
        MobiusError: it cannot be measured.
    """
    from mobius_train.measure import side_by_side

    deepspeed = deepspeed_json(arguments)
    job = side_by_side.Job(
        config=str(arguments.config),
        overrides=(*arguments.overrides, *variant.overrides),
        deepspeed=None if deepspeed is None else str(deepspeed),
        warmup=arguments.warmup,
        steps=arguments.steps,
        random_models=True,
    )
    found = side_by_side.measure_apart(job, variant.program)
    if "error" in found:
        raise MobiusError(f"{name}: {found['error']}")
    measured = found["measured"]
    accumulation = found["config"]["gradient_accumulation_steps"]
    return {
        "step_seconds": measured["step_seconds"],
        "seconds": measured["seconds"],
        "flop": {phase: flop * accumulation for phase, flop in found["planned"]["flops"].items()},
        "saved_bytes": sum(measured["saved"].values()),
        "peak_bytes": measured["resident_set"] if measured["peak"] is None else measured["peak"],
        "trained": found["planned"]["trained"],
        "device": measured["device"],
        "versions": found["versions"],
    }


def matrix_flops(overrides: list[str], size: int = 2048, seconds: float = 2.0) -> float:
    """Floating point operations per second that this machine reaches in products of square matrices."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if "mixed_precision=bf16" in overrides else torch.float32
    size *= 4 if device == "cuda" else 1
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / median(times)


def table(measured: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each variant: medians over the rounds, and the median of the rounds' ratios to the reference."""
    rows = []
    for name, rounds in measured.items():
        # Rounds without the reference have no ratio.
        pairs = list(zip(rounds, measured.get(REFERENCE, []), strict=False))
        flop = sum(rounds[0]["flop"].values())
        rows.append(
            {
                "variant": name,
                "step_seconds": median(r["step_seconds"] for r in rounds),
                "range": [min(r["step_seconds"] for r in rounds), max(r["step_seconds"] for r in rounds)],
                "of_serial": median(a["step_seconds"] / b["step_seconds"] for a, b in pairs) if pairs else None,
                "gflop": flop / 1e9,
                "gflop_of_serial": flop / sum(pairs[0][1]["flop"].values()) if pairs else None,
                "of_matrix_speed": median(flop / r["step_seconds"] / r["matrix_flops"] for r in rounds),
                "saved_mib": rounds[0]["saved_bytes"] / 2**20,
                "peak_mib": median(r["peak_bytes"] for r in rounds) / 2**20,
                "trained": rounds[0]["trained"],
                "share": shares(rounds),
            }
        )
    return rows


def shares(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds of each part's share of a step."""
    parts = list(dict.fromkeys(part for r in rounds for part in r["seconds"]))
    return {part: median(r["seconds"].get(part, 0) / sum(r["seconds"].values()) for r in rounds) for part in parts}


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| variant | s/step | of serial | GFLOP | of serial | of matrix speed | saved, MiB | peak, MiB | trained |",
        end="",
    )
    print(" largest parts |\n|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        largest = sorted(r["share"].items(), key=lambda item: -item[1])[:4]
        ratios = [" " if r[key] is None else f"{r[key]:.2f}" for key in ("of_serial", "gflop_of_serial")]
        print(
            f"| {r['variant']} | {r['step_seconds']:.3f} | {ratios[0]} | {r['gflop']:.0f} | {ratios[1]} |"
            f" {r['of_matrix_speed']:.0%} | {r['saved_mib']:.0f} |"
            f" {r['peak_mib']:.0f} | {r['trained'] / 1e6:.2f}M |"
            f" {', '.join(f'{part} {share:.0%}' for part, share in largest)} |"
        )


if __name__ == "__main__":
    run(main)
