"""Compare models from the paper's ring to the serial model on the embedded data: error, time, FLOPs and memory.

    python benchmarks/emoji_study.py --folder runs/study --record benchmarks/emoji_study.json
    python benchmarks/emoji_study.py --config configs/emoji_sd3.yaml --members serial paper paper-unmixed --folder ...

Every member trains in a process of its own on the same clips, in the same order and with the same noise; seeds change
all three. `--steps` are optimizer steps of the recipe; overrides change the recipe of all members. `NAME-shuffled` is a
control that trains on clips whose frames are in random order; `NAME-unmixed` is a transformer's ring that does not mix
positions. Results that exist in the folder are not computed again, so an interrupted study continues; tables and record
contain all results of the folder. It measures no times, because a study of hours shares its machine: `--times` reads
them from a record of step_time.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from ring_family import FAMILY
from step_time import name_of
from tqdm import tqdm

from mobius_train.cli import run, run_rank
from mobius_train.config import RunConfig, load
from mobius_train.errors import MobiusError
from mobius_train.files import replace_file
from mobius_train.job import environment
from mobius_train.shared_files import REPOSITORY, ZERO2

if TYPE_CHECKING:  # torch is imported after the environment is prepared
    from torch import nn

    from mobius_train.data.batch import EncodedBatch

SHUFFLED, UNMIXED = "-shuffled", "-unmixed"
MEMBERS = [f"{name}{suffix}" for name in FAMILY for suffix in ("", SHUFFLED, UNMIXED)]
# Motion is decided at high noise.
QUANTILE = 0.85
QUANTILES = "validation.timestep_quantiles=[0.1,0.3,0.5,0.7,0.85,0.95]"
# Share of the steps after which the error on the training clips is measured.
CHECKS = (1 / 3, 2 / 3, 1.0)
# Costs, and what they are divided by, of the serial model.
COSTS = (
    ("gflop", "gflop"),
    ("saved_mib", "saved_mib"),
    ("saved_mib_recomputed", "saved_mib"),
    ("step_seconds", "step_seconds"),
)
FIGURES = ("motion_correlation", "neighbour_ratio")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the results of each member and seed")
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=list(FAMILY), metavar="NAME")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "emoji.yaml", help="the recipe (YAML)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="override a field for all members")
    parser.add_argument("--record", type=Path, help="the JSON to write; a PNG with the same name is drawn")
    parser.add_argument("--times", type=Path, help="record of step_time.py with the same recipe, for the seconds")
    # One member, in its own process.
    parser.add_argument("--member", choices=MEMBERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.member:
        run_rank(lambda: _write_one(arguments))
    run(lambda: _study(arguments))


def _study(arguments: argparse.Namespace) -> None:
    if arguments.record and find_spec("matplotlib") is None:
        raise MobiusError("the record has a picture, which requires matplotlib: pip install 'mobius-train[plot]'")
    runs = [(member, seed) for seed in arguments.seeds for member in arguments.members]
    for member, seed in tqdm(runs, unit="run"):
        if not _result(arguments.folder, member, seed).is_file():
            _start(arguments, member, seed)
    results = _results(arguments.folder, arguments.steps)
    seconds = _step_seconds(arguments.times) if arguments.times else {}
    for result in results:
        result["step_seconds"] = seconds.get(_model_of(result["member"]))
    _print_means(results)
    _print(results)
    if arguments.record:
        from mobius_train.job.versions import versions

        machine = {"processor": platform.processor(), "cores": os.cpu_count(), "system": platform.platform()}
        record = {
            "config": name_of(arguments.config),
            "steps": arguments.steps,
            "set": arguments.set,
            "machine": machine,
            "versions": versions(),
        }
        replace_file(arguments.record, json.dumps(record | {"results": results}, indent=1) + "\n")
        _draw(results, arguments.record.with_suffix(".png"))


def _step_seconds(record: Path) -> dict[str, float]:
    """Seconds of a step by member."""
    return {row["variant"]: row["step_seconds"] for row in json.loads(record.read_text())["table"]}


def _model_of(member: str) -> str:
    """The name in FAMILY. Controls cost what their model does."""
    return member.removesuffix(SHUFFLED).removesuffix(UNMIXED)


def _result(folder: Path, member: str, seed: int) -> Path:
    return folder / f"{member}-{seed}.json"


def _results(folder: Path, steps: int) -> list[dict[str, Any]]:
    """All results of the folder, by member and seed.

    Raises:
        MobiusError: one is of another number of steps.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    other = sorted(f"{r['member']}-{r['seed']}" for r in results if r["curve"][-1]["step"] != steps)
    if other:
        raise MobiusError(f"{folder} contains results of another number of steps than {steps}: {', '.join(other)}")
    return sorted(results, key=lambda r: (MEMBERS.index(r["member"]), r["seed"]))


def _start(arguments: argparse.Namespace, member: str, seed: int) -> None:
    command = [sys.executable, __file__, "--member", member, "--seeds", str(seed), "--steps", str(arguments.steps)]
    command += ["--config", str(arguments.config), "--folder", str(arguments.folder)]
    command += ["--set", *arguments.set] if arguments.set else []
    log = arguments.folder / f"{member}-{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise MobiusError(f"{member} with seed {seed} ended with exit code {code}: see {log}")


def _write_one(arguments: argparse.Namespace) -> None:
    (seed,) = arguments.seeds
    member, steps, samples = (
        arguments.member,
        arguments.steps,
        arguments.folder / "samples" / f"{arguments.member}-{seed}",
    )
    # A member's own fields come last.
    overrides = [f"seed={seed}", *arguments.set, *FAMILY[_model_of(member)]]
    config = load(arguments.config, [f"output_dir={samples}", f"max_train_steps={steps}", QUANTILES, *overrides])
    result = {"member": member, "seed": seed, "overrides": overrides} | train(config, samples, member)
    replace_file(_result(arguments.folder, arguments.member, seed), json.dumps(result, indent=1) + "\n")


def train(config: RunConfig, samples: Path, member: str) -> dict[str, Any]:
    """Train one member and measure it."""
    launch = environment.prepare()
    from mobius_train.engine.choose import choose_engine
    from mobius_train.engine.spread import spread_of
    from mobius_train.job.distributed import Distributed
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.learning_rate import learning_rates
    from mobius_train.tasks.build_task import build_task
    from mobius_train.trainer import micro_batch

    quiet_libraries()
    spread = spread_of("deepspeed", ZERO2, launch)
    steps = config.max_train_steps
    assert steps is not None
    checks = {round(share * steps) for share in CHECKS}
    with Distributed(spread.launch) as distributed:
        make_engine = choose_engine(config, spread)
        task: Any = build_task(config, distributed)
        costs = _costs(task, config, spread)
        if member.endswith(UNMIXED):
            _without_mixing(task.trained)
        engine = make_engine(task.trained, task.units, distributed)
        task.prepare_data()
        learning_rate, batches = learning_rates(config, 1), task.training_batches(0)
        weights: Callable[[], Any] = engine.averaged_weights if config.use_ema else engine.weights
        curve = []
        for step in tqdm(range(steps), mininterval=10):
            batch = next(batches)
            micro_batch(task, engine, _shuffled(batch, step) if member.endswith(SHUFFLED) else batch)
            engine.step(learning_rate(step))
            if step + 1 in checks:
                curve.append({"step": step + 1, **_means(task.errors("train", weights()))})
        final = weights()
        shown = task.show(final, samples)
        return {
            "trained_parameters": sum(p.numel() for p in task.trained.parameters() if p.requires_grad),
            **costs,
            "memory_gb": distributed.peak_memory_gb(),
            "curve": curve,
            "heldout": _means(task.heldout_losses(final)),
            "figures": shown.figures,
        }


def _without_mixing(trained: nn.Module) -> None:
    """Multiply the mixing of positions by zero. Its weights and costs stay.

    Raises:
        MobiusError: the model has none.
    """
    from mobius_train.models.tokens.layers import Mixing

    mixing = [module for module in trained.modules() if isinstance(module, Mixing)]
    if not mixing:
        raise MobiusError("only the ring of a transformer mixes positions")
    for module in mixing:
        module.register_forward_hook(lambda module, inputs, output: output * 0)


def _shuffled(batch: EncodedBatch, step: int) -> EncodedBatch:
    """The batch with the frames of each clip in a random order."""
    import torch

    generator = torch.Generator().manual_seed(step)
    clips, _, frames = batch.mean.shape[:3]
    order = torch.stack([torch.randperm(frames, generator=generator) for _ in range(clips)])
    index = order[:, None, :, None, None].expand_as(batch.mean)
    return replace(batch, mean=batch.mean.gather(2, index), std=batch.std.gather(2, index))


def _means(totals: dict[str, Any]) -> dict[str, float]:
    return {name: total.sum / total.count for name, total in totals.items()}


def _costs(task: Any, config: Any, spread: Any) -> dict[str, Any]:
    """FLOPs of a micro-batch and bytes saved for its backward pass, simulated; kept and recomputed."""
    from mobius_train.plan.planner import plan

    found: dict[str, Any] = {}
    for name, recompute in (("", False), ("_recomputed", True)):
        planned = plan(config.model_copy(update={"gradient_checkpointing": recompute}), spread)
        found[f"gflop{name}"] = sum(planned.flops.values()) / 1e9
        found[f"saved_mib{name}"] = sum(planned.saved.values()) / 2**20
    return found


def _print(results: list[dict[str, Any]]) -> None:
    """A Markdown table."""
    steps = " / ".join(str(point["step"]) for point in results[0]["curve"])
    print(
        "| member, seed | trained, M | GFLOP | saved (recomputed), MiB | s/step |"
        f" motion error after {steps} steps | held out | corr | r |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for r in results:
        errors = " / ".join(f"{point[f'train_motion/{QUANTILE}']:.4f}" for point in r["curve"])
        seconds = "" if r["step_seconds"] is None else f"{r['step_seconds']:.2f}"
        figures = [r["figures"].get(f"{name}/samples", 0) for name in FIGURES]
        print(
            f"| {r['member']}, {r['seed']} | {r['trained_parameters'] / 1e6:.2f} | {r['gflop']:.0f} |"
            f" {r['saved_mib']:.0f} ({r['saved_mib_recomputed']:.0f}) | {seconds} | {errors} |"
            f" {r['heldout'][f'heldout_motion/{QUANTILE}']:.4f} | {figures[0]:.2f} | {figures[1]:.2f} |"
        )


def _print_means(results: list[dict[str, Any]]) -> None:
    """A row for each member, with means over its seeds and ratios to the serial model of the same seeds."""
    print(
        "| member | seeds | GFLOP of serial | saved of serial | saved, recomputed | s/step of serial |"
        f" motion error after {results[0]['curve'][-1]['step']} steps | of serial | held out | corr | r |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    serial = {r["seed"]: r for r in results if r["member"] == "serial"}
    for member in dict.fromkeys(r["member"] for r in results):
        seeds = [r for r in results if r["member"] == member]
        errors = [_error(r) for r in seeds]
        ratios = [_error(r) / _error(serial[r["seed"]]) for r in seeds if r["seed"] in serial]
        costs = [_ratio(seeds[0], serial, *keys) for keys in COSTS]
        spread = "" if len(errors) == 1 else f" ({min(errors):.4f} to {max(errors):.4f})"
        others = mean(r["heldout"][f"heldout_motion/{QUANTILE}"] for r in seeds)
        figures = [mean(r["figures"].get(f"{name}/samples", 0) for r in seeds) for name in FIGURES]
        print(
            f"| {member} | {len(seeds)} | {' | '.join(costs)} | {mean(errors):.4f}{spread} |"
            f" {f'{mean(ratios):.2f}' if ratios else ''} | {others:.4f} | {figures[0]:.2f} | {figures[1]:.2f} |"
        )


def _error(result: dict[str, Any]) -> float:
    return float(result["curve"][-1][f"train_motion/{QUANTILE}"])


def _ratio(result: dict[str, Any], serial: dict[int, dict[str, Any]], key: str, of: str) -> str:
    """A cost of a member over one of the serial model; empty if one is unknown."""
    reference = next(iter(serial.values()), {}).get(of)
    return f"{result[key] / reference:.2f}" if result[key] and reference else ""


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    """The error against FLOPs and against steps, or time where it is known; a line for each member and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    members = list(dict.fromkeys(r["member"] for r in results))
    timed = all(r["step_seconds"] for r in results)
    for r in results:
        errors = [point[f"train_motion/{QUANTILE}"] for point in r["curve"]]
        steps = [point["step"] for point in r["curve"]]
        first = r is next(other for other in results if other["member"] == r["member"])
        style = {"color": f"C{members.index(r['member']) % 10}", "marker": "o", "markersize": 3}
        style["linestyle"] = "-" if members.index(r["member"]) < 10 else "--"
        label = r["member"] if first else None
        axes[0].plot([step * (r["step_seconds"] if timed else 1) for step in steps], errors, label=label, **style)
        axes[1].plot([step * r["gflop"] / 1e3 for step in steps], errors, **style)
    axes[0].set(xlabel="seconds of training" if timed else "optimizer steps")
    axes[0].set(ylabel=f"motion error at timestep {QUANTILE:g} T, training clips")
    axes[1].set(xlabel="TFLOP")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
