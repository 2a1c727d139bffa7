"""Full float32 weights from a DeepSpeed checkpoint of ZeRO 1, 2 or 3.

The files are memory-mapped: of the optimizer's state only the float32 weights are read, one parameter at a time. The
layout is that of deepspeed.utils.zero_to_fp32, which unpickles arbitrary objects. Here the files may contain only
tensors and a few DeepSpeed types, which are replaced by stand-ins. DeepSpeed itself is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobius_train.convert.lazy_weights import Weights
from mobius_train.errors import MobiusError
from mobius_train.files import read_small
from mobius_train.pretrained.pickles import UNREADABLE, load_tensors


class _Fields:
    """The fields of an object without its class."""


STAND_INS: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": _Fields,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Fields,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Fields,
}
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OPTIMIZER_FILES = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILES = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")

Fragments = list[Tensor]


@dataclass(frozen=True)
class ZeroWeights:
    """The weights of a ZeRO checkpoint, and the tensors of the module for which it has no float32 weights."""

    weights: Weights
    stage: int
    world_size: int
    left_out: list[tuple[str, str]]


def find_tag(folder: Path, tag: str | None = None) -> Path | None:
    """The folder of the ranks' files: `folder` itself, or the one in it that `tag` or its file `latest` names.

    Raises:
        MobiusError: the tag is not a plain folder name, or there is no such folder.
    """
    if tag is None and any(OPTIMIZER_FILES.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    latest = folder / "latest"
    if tag is None and latest.is_file():
        tag = read_small(latest).decode("utf-8", "replace").strip()
        if not TAG.fullmatch(tag):
            raise MobiusError(
                f"{latest} contains {tag[:80]!r}, which is not a folder name: give the right one with --tag"
            )
    if tag is None:
        return None
    if not TAG.fullmatch(tag):
        raise MobiusError(f"the tag {tag!r} is not a plain folder name")
    if not (folder / tag).is_dir():
        raise MobiusError(f"{folder / tag} is missing: give another tag in {folder} with --tag")
    return folder / tag


def open_zero(folder: Path) -> ZeroWeights:
    """Open the ranks' files in `folder`.

    Raises:
        MobiusError: a file is missing, damaged, of another run, or contains code; names the file.
    """
    optimizer_files = _by_rank(folder, OPTIMIZER_FILES, "optim_states")
    model_files = _by_rank(folder, MODEL_FILES, "model_states")
    states = [load_tensors(path, STAND_INS) for path in optimizer_files]
    models = [load_tensors(path, STAND_INS) for path in model_files]
    try:
        return _assemble(optimizer_files, model_files, states, models)
    except UNREADABLE as error:
        raise MobiusError(
            f"the files in {folder} are inconsistent ({error!r}): they are damaged or from different checkpoints"
        ) from error


def _assemble(
    optimizer_files: list[Path], model_files: list[Path], states: list[Any], models: list[Any]
) -> ZeroWeights:
    optimizers = [state["optimizer_state_dict"] for state in states]
    if "zero_stage" not in optimizers[0]:
        raise MobiusError(f"{optimizer_files[0]} is not a ZeRO state: stage 0 has full weights in its model_states")
    stage = int(optimizers[0]["zero_stage"])
    count = optimizers[0]["partition_count"]
    world_size = max(count) if isinstance(count, list) else int(count)
    if world_size != len(states):
        raise MobiusError(
            f"{optimizer_files[0].parent} was written by {world_size} ranks, but contains the optim_states of"
            f" {len(states)}: some files are missing or left over from another run"
        )
    if stage == 3 and len(models) != world_size:
        raise MobiusError(
            f"{model_files[0].parent} contains the model_states of {len(models)} of {world_size} ranks: some"
            " are missing"
        )
    first = models[0]
    shapes: list[dict[str, torch.Size]] = first["param_shapes"]
    buffers = {name: first["module"][name] for name in first["buffer_names"] if name in first["module"]}
    pieces = _FlatRanges(shapes, optimizers) if stage <= 2 else _ParameterShards(shapes, optimizers)
    pieces.check(optimizer_files)
    frozen_shapes: dict[str, torch.Size] = first["frozen_param_shapes"] or {}
    layout = {name: _meta(tensor.shape, _float32(tensor).dtype) for name, tensor in buffers.items()}
    layout |= {name: _meta(shape, first["frozen_param_fragments"][name].dtype) for name, shape in frozen_shapes.items()}
    layout |= {name: _meta(shape, torch.float32) for group in shapes for name, shape in group.items()}
    tied = {name: origin for name, origin in first["shared_params"].items() if origin in layout}
    layout |= {name: layout[origin] for name, origin in tied.items()}
    names_of: dict[str, list[str]] = {}
    for name, origin in tied.items():
        names_of.setdefault(origin, []).append(name)

    def untied() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in buffers.items():
            yield name, _float32(tensor)
        for name, shape in frozen_shapes.items():
            fragments = [model["frozen_param_fragments"][name] for model in models]
            yield name, fragments[0] if stage <= 2 else torch.cat(fragments)[: shape.numel()].view(shape)
        yield from pieces.read()

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in untied():
            for each in (name, *names_of.get(name, ())):
                yield each, tensor

    left_out = [
        (name, f"frozen: ZeRO {stage} saves no float32 weight, since training does not change it")
        for name in first["module"]
        if name not in layout
    ]
    return ZeroWeights(Weights(layout, read), stage, world_size, left_out)


class _FlatRanges:
    """Stages 1 and 2: the parameters of a group are concatenated and split into one range per rank."""

    def __init__(self, shapes: list[dict[str, torch.Size]], optimizers: list[Any]) -> None:
        self._shapes = shapes
        self._ranges: list[Fragments] = [optimizer["single_partition_of_fp32_groups"] for optimizer in optimizers]
        self._paddings: list[list[int]] | None = optimizers[0].get("param_alignment_paddings")

    def check(self, files: list[Path]) -> None:
        for file, ranges in zip(files, self._ranges, strict=True):
            if len(ranges) != len(self._shapes):
                raise MobiusError(
                    f"{file} contains {len(ranges)} parameter groups, but the model has {len(self._shapes)}"
                )
        # DeepSpeed pads the end of a group to a multiple of this.
        align = 2 * len(self._ranges)
        for group, shapes in enumerate(self._shapes):
            expected = sum(shape.numel() for shape in shapes.values())
            if self._paddings is not None:
                expected += sum(self._paddings[group])
            actual = sum(len(ranges[group]) for ranges in self._ranges)
            if math.ceil(expected / align) != math.ceil(actual / align):
                raise MobiusError(
                    f"the optim_states in {files[0].parent} contain {actual} numbers of parameter group {group}, but"
                    f" its shapes require {expected}: the files are from different checkpoints"
                )

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for group, shapes in enumerate(self._shapes):
            ranges = [rank[group] for rank in self._ranges]
            paddings = [0] * len(shapes) if self._paddings is None else self._paddings[group]
            start = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                yield name, _between(ranges, start, start + shape.numel()).view(shape)
                start += shape.numel() + padding


class _ParameterShards:
    """Stage 3: every parameter is split into equal shards, the last one padded; a rank's shards are concatenated."""

    def __init__(self, shapes: list[dict[str, torch.Size]], optimizers: list[Any]) -> None:
        self._shapes = {name: shape for group in shapes for name, shape in group.items()}
        self._shards: list[Fragments] = [optimizer["fp32_flat_groups"] for optimizer in optimizers]

    def check(self, files: list[Path]) -> None:
        expected = sum(math.ceil(shape.numel() / len(self._shards)) for shape in self._shapes.values())
        for file, shards in zip(files, self._shards, strict=True):
            actual = sum(len(shard) for shard in shards)
            if actual != expected:
                raise MobiusError(
                    f"{file} contains {actual} numbers, but the model's shapes require {expected} per rank"
                )

    def read(self) -> Iterator[tuple[str, Tensor]]:
        start = 0
        for name, shape in self._shapes.items():
            end = start + math.ceil(shape.numel() / len(self._shards))
            whole = torch.cat([_between(shards, start, end) for shards in self._shards])
            yield name, whole[: shape.numel()].view(shape)
            start = end


def _between(parts: Fragments, start: int, end: int) -> Tensor:
    """Elements start … end of concatenated flat tensors; a view if they are all in one tensor."""
    pieces, offset = [], 0
    for part in parts:
        low, high = max(start - offset, 0), min(end - offset, len(part))
        if low < high:
            pieces.append(part[low:high])
        offset += len(part)
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if pieces else parts[0][:0]


def _by_rank(folder: Path, pattern: re.Pattern[str], what: str) -> list[Path]:
    files = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match is not None:
            if int(match.group(2)) != 0:
                raise MobiusError(f"{path} belongs to a model with tensor parallelism, which is not supported")
            files[int(match.group(1) or 0)] = path
    if not files:
        raise MobiusError(f"{folder} contains no {what} file of DeepSpeed's ZeRO: give the folder with these files")
    missing = [rank for rank in range(max(files) + 1) if rank not in files]
    if missing:
        raise MobiusError(f"{folder} lacks the {what} of rank {missing[0]}: copy the whole folder again")
    return [files[rank] for rank in sorted(files)]


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _meta(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
