"""Verify the claims about memory and step time on one GPU, with each setting in a separate process.

The workload is the paper's (configs/paper_sd21.yaml: SD 2.1, batch 2, 8 frames, 256 px, 512 text tokens, encoders
online) with random weights, so no model files are needed. The record contains the plan and measurement of every
setting, and the verdicts. Settings already in the record are skipped, so an interrupted run can resume. Exits 1 if a
setting or a claim fails; with --only, claims about other settings stay open.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobius_train.cli import add_deepspeed_option, run
from mobius_train.errors import MobiusError
from mobius_train.job.environment import choose_accelerator
from mobius_train.shared_files import REPOSITORY

GB = 1e9
HALF = "mixed_precision=bf16"
RECOMPUTED = "gradient_checkpointing=true"
EIGHT_BIT = "optimizer=adamw_8bit"
CACHED = "data.cache_dir=.cache"


@dataclass(frozen=True)
class Setting:
    """A variant of the recipe.

    Attributes:
        limit_gb: limit of the GPU's allocator, for claims that this much memory is enough.
        fsdp: use FSDP, which keeps fewer copies on one GPU than DeepSpeed.
    """

    name: str
    overrides: tuple[str, ...]
    limit_gb: float | None = None
    fsdp: bool = False


SETTINGS = (
    *(
        Setting(f"{mode} {precision}{' recomputed' if recomputed else ''}", (f"mode={mode}", *half, *recomputed))
        for precision, half in (("fp32", ()), ("bf16", (HALF,)))
        for mode in ("parallel", "serial", "full")
        for recomputed in ((), (RECOMPUTED,))
    ),
    Setting("parallel bf16 cached", (HALF, CACHED)),
    Setting("parallel bf16 recomputed cached", (HALF, RECOMPUTED, CACHED)),
    Setting("parallel bf16 recomputed fsdp", (HALF, RECOMPUTED), fsdp=True),
    Setting("parallel bf16 batch 4", (HALF, "train_batch_size=4")),
    Setting("parallel bf16 recomputed 16 frames", (HALF, RECOMPUTED, "data.num_frames=16")),
    Setting("parallel bf16 recomputed 512 px", (HALF, RECOMPUTED, "data.resolution=512")),
    Setting("parallel bf16 recomputed ema", (HALF, RECOMPUTED, "use_ema=true")),
    # Latents and texts were computed before the run (tools/cache_latents.py).
    *(
        Setting(name, (HALF, RECOMPUTED, CACHED, "data.cache_required=true", f"ring_width={width}"), fsdp=True)
        for name, width in (("half", 0.5), ("quarter", 0.25))
    ),
    # The context needs part of the 16 and 11 GB in addition to the allocator.
    Setting("16 GB", (HALF, RECOMPUTED, CACHED), limit_gb=15.2, fsdp=True),
    Setting("11 GB", (HALF, RECOMPUTED, CACHED, EIGHT_BIT), limit_gb=10.2, fsdp=True),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="JSON, written after every setting")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "paper_sd21.yaml", help="the recipe")
    add_deepspeed_option(parser)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(s.name for s in SETTINGS)}")
    parser.add_argument("--again", action="store_true", help="measure settings again that are already in the record")
    parser.add_argument(
        "--warmup", type=int, default=3, help="optimizer steps before the measurement (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--rehearse-on-cpu", action="store_true", help="for a tiny recipe: run the settings without verdicts"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    choose_accelerator()
    import torch

    from mobius_train.measure.side_by_side import Job, failures, measure_apart

    if not torch.cuda.is_available() and not arguments.rehearse_on_cpu:
        raise MobiusError("no GPU is available: run this benchmark on a machine where torch detects a GPU")
    chosen = select(arguments.only)
    records = read(arguments.record)
    for setting in chosen:
        if "measured" in records.get(setting.name, {}) and not arguments.again:
            continue
        job = Job(
            config=str(arguments.config),
            overrides=(*arguments.overrides, *setting.overrides),
            deepspeed=None if setting.fsdp else str(arguments.deepspeed),
            warmup=arguments.warmup,
            steps=arguments.steps,
            random_models=True,
            limit_gb=None if arguments.rehearse_on_cpu else setting.limit_gb,
        )
        records[setting.name] = measure_apart(job)
        print(line(setting.name, records[setting.name]), flush=True)
        require_one_device(records, arguments.record)
        write(arguments.record, records)
    verdicts = {} if arguments.rehearse_on_cpu else judge(records)
    write(arguments.record, records, verdicts)
    for name, verdict in verdicts.items():
        result = "holds" if verdict["holds"] else "FAILS" if verdict["measured"] else "open "
        print(f"{result}  {name}: {verdict['found']}")
    failed = [*failures({setting.name: records[setting.name] for setting in chosen})]
    # A claim about settings that were not chosen is open.
    failed += [name for name, v in verdicts.items() if not v["holds"] and (v["measured"] or arguments.only is None)]
    if failed:
        raise MobiusError("\n".join(["not as claimed, or not measured:", *(f"  - {text}" for text in failed)]))


def select(names: list[str] | None) -> list[Setting]:
    """The settings with these names, or all."""
    unknown = set(names or ()) - {setting.name for setting in SETTINGS}
    if unknown:
        raise MobiusError(
            f"unknown settings: {', '.join(sorted(unknown))}. Choose from: {', '.join(s.name for s in SETTINGS)}"
        )
    return [setting for setting in SETTINGS if names is None or setting.name in names]


def judge(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The result of each claim; a claim fails if one of its settings was not measured."""
    measured = {name: record["measured"] for name, record in records.items() if "measured" in record}
    verdicts: dict[str, dict[str, Any]] = {}

    def claim(what: str, needs: tuple[str, ...], value: Any, bound: float, unit: str) -> None:
        missing = [name for name in needs if name not in measured]
        found = None if missing else value(*(measured[name] for name in needs))
        text = f"not measured: {', '.join(missing)}" if found is None else f"{found:.3g}{unit}"
        holds = found is not None and found <= bound
        verdicts[what] = {"found": text, "value": found, "bound": bound, "measured": not missing, "holds": holds}

    for name, size in (("16 GB", 16.0), ("11 GB", 11.0), ("half", 8.0), ("quarter", 4.0)):
        claim(f"the paper's workload, {name}, in at most {size:g} GB", (name,), taken, size, " GB")
    for precision in ("fp32", "bf16"):
        pair = (f"parallel {precision}", f"serial {precision}")
        claim(f"peak of parallel is at most 0.65 of serial's, {precision}", pair, ratio("peak"), 0.65, "")
        claim(f"step of parallel takes at most 0.75 of serial's, {precision}", pair, ratio("step_seconds"), 0.75, "")
    errors = {name: error for name in measured if (error := plan_error(records[name])) is not None}
    enough = len(errors) >= 12
    worst = max(errors, key=lambda name: abs(errors[name]), default="")
    verdicts["the plan is within 5% of the measured peak in at least 12 settings"] = {
        "found": f"{len(errors)} settings, the worst {worst!r}" + (f" {errors[worst]:+.1%}" if errors else ""),
        "value": errors,
        "bound": 0.05,
        "measured": enough,
        "holds": enough and all(abs(error) <= 0.05 for error in errors.values()),
    }
    return verdicts


def taken(measured: dict[str, Any]) -> float:
    """The process's peak GPU memory in GB: inside and outside the allocator."""
    return (max(peak["reserved"] for peak in measured["phases"].values()) + measured["outside"]) / GB


def ratio(figure: str) -> Any:
    return lambda parallel, serial: parallel[figure] / serial[figure]


def plan_error(record: dict[str, Any]) -> float | None:
    """The plan's relative error of the peak, with the measured context added to both."""
    from mobius_train.measure.versus_plan import PEAK

    outside = record["measured"]["outside"]
    for row in record["rows"]:
        if row["name"] == PEAK:
            return (row["planned"] + outside) / (row["measured"] + outside) - 1
    return None


def line(name: str, record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{name}: NOT MEASURED: {record['error'].splitlines()[0]}"
    measured = record["measured"]
    saved = sum(measured["saved"].values()) / GB
    text = f"{name}: {measured['step_seconds']:.3f} s/step, {saved:.3f} GB saved for backward"
    if measured["peak"] is None:
        return text
    return (
        f"{text}, peak {measured['peak'] / GB:.2f} GB (plan {plan_error(record):+.1%}), taken {taken(measured):.2f} GB"
    )


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The settings of an existing record."""
    if not path.exists():
        return {}
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise MobiusError(f"{path} is not a record of this benchmark ({error!r}): give another file") from error
    return found


def require_one_device(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Refuse ratios between two kinds of GPU.

    Raises:
        MobiusError: the settings were measured on more than one.
    """
    devices = sorted({record["measured"]["device"] for record in records.values() if "measured" in record})
    if len(devices) > 1:
        raise MobiusError(f"{path} was measured on another device ({' and '.join(devices)}): choose another --record")


def write(path: Path, records: dict[str, Any], verdicts: dict[str, Any] | None = None) -> None:
    record = {"what": "memory and step time on one GPU, planned and measured", "claims": verdicts or {}}
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record | {"settings": records}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    run(main)
