"""Test and measure on one GPU in limited time, the most valuable items first.

    python benchmarks/gpu_day.py --folder h100 --minutes 25

Each item is a command with a log and a record of its own in the folder; gpu_day.json lists them with the GPU, the
versions and the commit. An item that fails or does not end in time does not stop the others. Call it again on the same
kind of machine to continue: finished items are skipped, and unfinished ones continue from their records. Exits 1 if an
item failed or is unfinished, or if a goal is missed or open, that is, not measured. `--rehearse` runs small versions of
all items on a CPU and judges no goal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from step_time import FROZEN

from mobius_train.cli import run
from mobius_train.errors import MobiusError
from mobius_train.files import replace_file
from mobius_train.job.versions import versions
from mobius_train.shared_files import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
# Tests in one process, of a few seconds each; whole runs; and those that compile.
QUICK_TESTS = ("tests/models/test_offload_gpu.py", "tests/models/test_ahead.py", "tests/tasks/test_waits.py")
RUNS, COMPILING = "tests/runs/test_gpu.py", "tests/assembly/test_options.py"
DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"
# The paper's recipe with what costs no accuracy: bf16 compute, and latents and texts computed once.
OURS = ("mixed_precision=bf16", "data.cache_dir=.cache/latents")


@dataclass(frozen=True)
class Item:
    """A command.

    Attributes:
        limit: seconds after which it is stopped.
    """

    name: str
    command: tuple[str, ...]
    limit: float


def items(folder: Path, rehearse: bool) -> list[Item]:
    """All items, the most valuable first."""
    python, paper = sys.executable, str(REPOSITORY / "configs" / "paper_sd21.yaml")
    if rehearse:
        paper = str(REPOSITORY / "configs" / "emoji.yaml")

    def step_time(name: str, limit: float, *options: str, record: str | None = None) -> Item:
        path = folder / f"step_time_{(record or name).replace(' ', '_')}.json"
        command = (python, str(BENCHMARKS / "step_time.py"), "--record", str(path), "--config", paper, *options)
        return Item(f"step time, {name}", command, 60 if rehearse else limit)

    def peers(*options: str) -> Item:
        record = folder / "peers.json"
        variants = ("UNet3D",) if rehearse else ("serial", "half", "tail-2", "UNet3D", "AnimateDiff")
        command = (python, str(BENCHMARKS / "peers.py"), "--record", str(record), "--config", paper, "--variants")
        return Item("step time, peers", (*command, *variants, *options), 60 if rehearse else 420)

    def memory(name: str, limit: float, *settings: str) -> Item:
        few = ("--rehearse-on-cpu", "--warmup", "0", "--steps", "1", "--config", paper) if rehearse else ()
        only = ("--only", *(settings[:1] if rehearse else settings))
        command = (python, str(BENCHMARKS / "gpu_memory.py"), "--record", str(folder / "gpu_memory.json"), *few, *only)
        return Item(f"memory, {name}", command, 120 if rehearse else limit)

    def tests(name: str, limit: float, *options: str) -> Item:
        # With -v the log names the tests that have run, also if the item is stopped.
        command = (python, "-m", "pytest", "-v", "-m", "gpu")
        return Item(f"tests, {name}", (*command, *options), 60 if rehearse else limit)

    few = ("--warmup", "0", "--steps", "1") if rehearse else ("--steps", "10")
    once, twice = ("--rounds", "1"), ("--rounds", "1" if rehearse else "2")
    main = ("--variants", *(("tail-2",) if rehearse else ("serial", "paper", "half", "tail-2")))
    frozen = [f"half, frozen {how}" for how in ("ahead", "int8", "channels_last")]
    compiled = [f"half, frozen {how}" for how in FROZEN if f"half, frozen {how}" not in frozen]
    if rehearse:
        frozen, compiled = ["tail-2, frozen ahead"], ["tail-2, frozen compiled"]
    big = () if rehearse else ("data.resolution=512",)
    ours = () if rehearse else OURS
    workers = ("-n", "5", "--dist", "load") if find_spec("xdist") else ()
    training = (
        *(python, str(REPOSITORY / "mobius_train" / "main.py")),
        *("--config", str(REPOSITORY / "configs" / "emoji_all.yaml"), "max_train_steps=12000"),
        *(f"output_dir={folder / 'emoji-all'}", "resume_from_checkpoint=auto"),
    )
    return [
        tests("quick", 75, *QUICK_TESTS),
        step_time("ours", 180, *main, *once, *few, *ours),
        step_time("paper", 60, "--variants", main[-1] if rehearse else "paper", *once, *few),
        memory("claims", 190, "16 GB", "half", "quarter", "parallel bf16", "serial bf16"),
        tests("runs", 180, RUNS, *workers),
        step_time("frozen branch", 120, "--variants", "half", *frozen, *once, *few, *ours),
        tests("compiling", 240, COMPILING),
        step_time("frozen branch compiled", 300, "--variants", "half", *compiled, *once, *few, *ours),
        step_time("ours, second round", 180, *main, *twice, *few, *ours, record="ours"),
        peers(*once, *few, *ours),
        memory("all settings", 600, *_settings()),
        step_time("512px", 420, *main, *once, *few, *ours, *big),
        Item(
            "temporal attention",
            (python, str(BENCHMARKS / "temporal_attention.py"), "--record", str(folder / "temporal_attention.json")),
            5 if rehearse else 120,
        ),
        # Hours on a CPU: the motion of all training clips, with 72 looks at each.
        Item("emoji on all clips", (*training, "--dry-run") if rehearse else training, 60 if rehearse else 900),
    ]


def _settings() -> list[str]:
    from gpu_memory import SETTINGS

    return [setting.name for setting in SETTINGS]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for records and logs")
    parser.add_argument("--minutes", type=float, default=25, help="time for all items (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="small versions of the items, on a CPU")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    gpu = gpu_name()
    if gpu is None and not arguments.rehearse:
        raise MobiusError("no GPU is available: run this on a machine where torch detects a GPU, or use --rehearse")
    ends = time.monotonic() + arguments.minutes * 60
    folder = arguments.folder.resolve()  # Items run in the repository.
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu_day.json"
    record = _read(path, gpu)
    for item in items(folder, arguments.rehearse):
        if record["items"].get(item.name, {}).get("status") == DONE:
            continue
        left = ends - time.monotonic()
        found = {"command": " ".join(item.command), "status": UNFINISHED, "seconds": 0.0, "versions": versions()}
        record["items"][item.name] = found
        if left > 0:
            print(f"{item.name}: at most {min(left, item.limit):.0f} s", flush=True)
            found |= start(item, folder, min(left, item.limit))
        print(f"{item.name}: {found['status']}", flush=True)
        replace_file(path, json.dumps(record, indent=1) + "\n")
    record["goals"] = [] if arguments.rehearse else goals(folder)
    replace_file(path, json.dumps(record, indent=1) + "\n")
    problems = [f"{name}: {item['status']}" for name, item in record["items"].items() if item["status"] != DONE]
    for goal in record["goals"]:
        verdict = "reached" if goal["reached"] else "open   " if goal["value"] is None else "MISSED "
        print(f"{verdict}  {goal['goal']}: {goal['found']}")
        if not goal["reached"]:
            problems.append(f"{goal['goal']}: {goal['found']}")
    if problems:
        raise MobiusError("\n".join([f"see the logs in {folder}:", *(f"  - {text}" for text in problems)]))


def start(item: Item, folder: Path, limit: float) -> dict[str, Any]:
    """Run an item; returns its status and seconds. After the limit the processes that it started are stopped."""
    log = folder / f"{item.name.replace(', ', '_').replace(' ', '_')}.log"
    started = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            item.command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = FAILED if process.wait(timeout=limit) else DONE
        except subprocess.TimeoutExpired:
            status = UNFINISHED
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"status": status, "seconds": round(time.monotonic() - started, 1), "log": log.name}


def gpu_name() -> str | None:
    """The name of the GPU; None without one.

    Asked in a process of its own: a CUDA context here would count as memory that a measured process takes.
    """
    code = "from step_time import gpu_name; print(gpu_name() or '')"
    found = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True, check=True)
    return found.stdout.strip() or None


def goals(folder: Path) -> list[dict[str, Any]]:
    """What the records show of each goal; a goal without its record is not reached and has no value."""

    def table(name: str) -> dict[str, dict[str, Any]]:
        path = folder / f"step_time_{name}.json"
        rows = json.loads(path.read_text(encoding="utf-8")).get("table", []) if path.exists() else []
        return {row["variant"]: row for row in rows}

    found: list[dict[str, Any]] = []

    def goal(what: str, value: float | None, reached: bool) -> None:
        text = "not measured" if value is None else f"{value:.3g}"
        found.append({"goal": what, "found": text, "value": value, "reached": reached})

    ours, paper = table("ours"), table("paper")
    for variant, bound in (("paper", 0.75), ("half", 0.5)):
        value = ours.get(variant, {}).get("of_serial")
        goal(f"a step of {variant} takes at most {bound} of serial's", value, value is not None and value <= bound)
    best = max((row["of_matrix_speed"] for row in ours.values()), default=None)
    goal("at least 0.35 of the speed of matrix products", best, best is not None and best >= 0.35)
    fastest = min((row["step_seconds"] for row in ours.values()), default=None)
    faster = paper["paper"]["step_seconds"] / fastest if fastest and "paper" in paper else None
    goal("optimizer steps per second at least 20 times the paper's recipe", faster, faster is not None and faster >= 20)
    from gpu_memory import judge

    memory = folder / "gpu_memory.json"
    # Judged here, because a benchmark that was stopped has measurements and no verdicts.
    settings = json.loads(memory.read_text(encoding="utf-8"))["settings"] if memory.exists() else {}
    return [
        *found,
        *(
            {"goal": name, "reached": claim["holds"]}
            | {"found": claim["found"], "value": claim["value"] if claim["measured"] else None}
            for name, claim in judge(settings).items()
        ),
    ]


def _read(path: Path, gpu: str | None) -> dict[str, Any]:
    """The record to continue, or a new one.

    Raises:
        MobiusError: it is of another GPU.
    """
    if not path.exists():
        return {"gpu": gpu, "items": {}}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["gpu"] != gpu:
        raise MobiusError(f"{path} was measured on {record['gpu']}, and this is {gpu}: choose another --folder")
    return record


if __name__ == "__main__":
    run(main)
