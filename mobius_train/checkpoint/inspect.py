"""Identification of a folder as a checkpoint, a run, a pipeline …, from names, JSON and safetensors headers.

Checkpoint files are hashed. No tensor is loaded and nothing is unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mobius_train.checkpoint.folders import checkpoints, pointed
from mobius_train.checkpoint.format import MANIFEST, STATE, State, read_json
from mobius_train.checkpoint.verify import index, problems
from mobius_train.errors import MobiusError
from mobius_train.run_files import FINAL, METRICS

# File names of DeepSpeed's save_checkpoint.
DEEPSPEED = re.compile(r"(mp_rank_\d+|zero_pp_rank_\d+_mp_rank_\d+|bf16_zero_pp_rank_\d+_mp_rank_\d+)_\w+\.pt")

Report = dict[str, Any]
UNKNOWN = "unknown"  # the kind of a folder that is none of those below


def inspect(folder: Path) -> Report:
    """Return `kind`, `step` (or None), `parts` (name, bytes, tensor shapes by name) and `problems` as JSON values.

    Raises:
        MobiusError: the folder does not exist.
    """
    if not folder.is_dir():
        raise MobiusError(f"{folder} is not a folder: give a checkpoint, a run's output_dir or a model folder")
    kinds: list[tuple[str, Callable[[Path], bool], Callable[[Path], Report]]] = [
        ("checkpoint", lambda f: (f / MANIFEST).is_file() or (f / STATE).is_file(), _checkpoint),
        ("diffusers pipeline", lambda f: (f / "model_index.json").is_file(), _pipeline),
        ("diffusers model", lambda f: _description(f) is not None, _model),
        ("DeepSpeed checkpoint", lambda f: any(DEEPSPEED.fullmatch(path.name) for path in _files(f)), _deepspeed),
        ("run", lambda f: bool(checkpoints(f)) or (f / METRICS).is_file(), _run),
        ("folder of diffusers models", lambda f: any(f.glob("*/*config.json")), _models),
    ]
    base: Report = {"path": str(folder), "kind": UNKNOWN, "step": None, "parts": [], "problems": []}
    for kind, is_one, report in kinds:
        if is_one(folder):
            return base | {"kind": kind} | report(folder)
    return base | {"parts": [_part(path, folder) for path in _files(folder)]}


def _checkpoint(folder: Path) -> Report:
    found = problems(folder)
    if found:
        return {"problems": found, "parts": [_part(path, folder, tensors=False) for path in _files(folder)]}
    state = State.read(folder)
    tensors: dict[str, dict[str, list[int]]] = {}
    for name, parts in index(folder, state.world_size).items():
        kind, _, parameter = name.partition("/")
        tensors.setdefault(kind, {})[parameter] = list(parts[0].shape)
    kinds = [{"name": kind, "bytes": 4 * _elements(shapes), "tensors": shapes} for kind, shapes in tensors.items()]
    contents = state.contents
    stage = "" if contents.zero_stage is None else f", ZeRO {contents.zero_stage}"
    return {
        "step": state.progress["step"],
        "parts": kinds,
        "ranks": state.world_size,
        "global_batch_size": state.global_batch_size,
        "engine": f"{contents.engine}{stage}, mixed_precision={contents.mixed_precision}",
        "frozen": {"sha256": state.frozen_sha256, "source": state.frozen_source},
        "versions": state.versions,
    }


def _run(folder: Path) -> Report:
    inside = [inspect(path) for path in checkpoints(folder)]
    good = [report["step"] for report in inside if not report["problems"]]
    parts = [_part(path, folder, tensors=False) for path in _files(folder)]
    final = [inspect(path) for path in (folder / FINAL,) if path.is_dir()]
    return {
        "step": max(good, default=None),
        "latest": pointed(folder),
        "parts": parts,
        "folders": inside + final,
        "problems": [problem for report in inside for problem in report["problems"]],
    }


def _pipeline(folder: Path) -> Report:
    return _classed(folder, "model_index.json")


def _model(folder: Path) -> Report:
    return _classed(folder, str(_description(folder)))


def _description(folder: Path) -> str | None:
    """Return the name of the file that holds the folder's diffusers or transformers class, if there is one."""
    names = ("config.json", "scheduler_config.json")
    return next((name for name in names if (folder / name).is_file()), None)


def _models(folder: Path) -> Report:
    inside = [inspect(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    parts = [_part(path, folder) for path in _files(folder)]
    return {"parts": parts, "folders": inside, "problems": [p for report in inside for p in report["problems"]]}


def _classed(folder: Path, description: str) -> Report:
    try:
        name, found = read_json(folder / description).get("_class_name"), []
    except MobiusError as error:
        name, found = None, [str(error)]
    parts = [_part(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {"class": name, "parts": parts, "problems": found + [part["problem"] for part in parts if "problem" in part]}


def _deepspeed(folder: Path) -> Report:
    step = re.fullmatch(r"global_step(\d+)", folder.name)
    note = "its files are pickles, which can run arbitrary code: convert it only if you trust its source"
    return {
        "step": int(step[1]) if step else None,
        "note": note,
        "parts": [_part(path, folder) for path in _files(folder)],
    }


def _part(path: Path, folder: Path, tensors: bool = True) -> Report:
    part: Report = {"name": str(path.relative_to(folder)), "bytes": path.stat().st_size}
    if tensors and path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                part["tensors"] = {name: file.get_slice(name).get_shape() for name in names}
        except (OSError, SafetensorError) as error:
            part["problem"] = f"{path}: not safetensors ({error})"
    return part


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _elements(shapes: dict[str, list[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
