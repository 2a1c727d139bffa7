"""Consolidation of a sharded training checkpoint to safetensors, without GPUs and with the memory of one tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from mobius_train.bars import DELAY, progress
from mobius_train.checkpoint.format import MODEL
from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.convert import distributed_checkpoint, zero
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.lazy_weights import Weights, cast_floating
from mobius_train.convert.run_checkpoint import find_run_checkpoint, weights_of
from mobius_train.convert.safetensors_files import write_safetensors
from mobius_train.errors import MobiusError
from mobius_train.files import check_writable


def consolidate_checkpoint(
    source: Path,
    destination: Path,
    dtype: torch.dtype = torch.float32,
    weights: str = MODEL,
    tag: str | None = None,
    max_shard_size: str = "5GB",
) -> Report:
    """Write the full weights of a checkpoint, read them back and compare.

    Args:
        source: a run's folder or one of its checkpoints; or a folder of DeepSpeed (ZeRO 1 to 3) or of
            torch.distributed.checkpoint (FSDP).
        destination: NAME.safetensors; becomes several files and an index if larger than `max_shard_size`.
        dtype: dtype of floating-point tensors.
        weights: entry of the checkpoint: a run has "model", and "ema" with use_ema; DeepSpeed has only "model".
        tag: selects a checkpoint in a folder with several; None: the one named in the file `latest`.

    Raises:
        MobiusError: the source is damaged, incomplete, of another kind or contains code (names the file); or the
            destination exists or cannot be written.
    """
    if destination.suffix != ".safetensors":
        raise MobiusError(f"the output {destination} must be named NAME.safetensors")
    stem = destination.name.removesuffix(".safetensors")
    present = [p for p in (destination, *destination.parent.glob(f"{stem}-*-of-*.safetensors")) if p.exists()]
    if present:
        raise MobiusError(f"{present[0]} exists: choose another output or remove it")
    check_writable(destination, file=True)
    report = Report(source, destination)
    opened = open_weights(source, weights, tag, report)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MobiusError(f"cannot create the folder of {destination}: {error.strerror}") from error
    files = write_safetensors(opened, destination, dtype, max_shard_size)
    size = sum(file.stat().st_size for file in files)
    where = files[0].name if len(files) == 1 else f"{len(files)} files and {destination.name}.index.json"
    report.mapped.append((f"{len(opened.layout)} tensors", f"{where}, {dtype}, {size / 1e6:.1f} MB"))
    different = _different(opened, files, dtype)
    report.require(not different, f"the {len(opened.layout)} tensors read back are bit-identical to the checkpoint's")
    report.problems += [f"{name} differs" for name in different]
    if different:
        for file in (*files, destination.with_name(f"{destination.name}.index.json")):
            file.unlink(missing_ok=True)
    report.raise_problems()
    return report


def open_weights(source: Path, weights: str, tag: str | None, report: Report) -> Weights:
    """Open the weights of a checkpoint folder of any supported kind; the report lists its other contents.

    Raises:
        MobiusError: see `consolidate_checkpoint`.
    """
    if not source.is_dir():
        raise MobiusError(f"there is no folder {source}")
    run_checkpoint = find_run_checkpoint(source, tag)
    if run_checkpoint is not None:
        checkpoint = open_checkpoint(run_checkpoint)
        report.left_out.append(("the optimizer's state", "not weights"))
        report.notes.append(f"step {checkpoint.state.progress['step']}, {checkpoint.state.world_size} rank(s)")
        return weights_of(checkpoint, weights)
    if (source / distributed_checkpoint.METADATA).is_file():
        sharded = distributed_checkpoint.open_distributed(source, weights)
        report.left_out += sharded.left_out
        return sharded.weights
    folder = zero.find_tag(source, tag)
    if folder is None:
        raise MobiusError(
            f"{source} is not a supported checkpoint: a run's checkpoint has a manifest.json, DeepSpeed's a file"
            " `latest` or the ranks' *_optim_states.pt (use --tag to select one of several), and"
            " torch.distributed.checkpoint's a .metadata"
        )
    if weights != MODEL:
        raise MobiusError(f"{folder} is a DeepSpeed checkpoint, which has no {weights!r}: its weights are {MODEL!r}")
    opened = zero.open_zero(folder)
    report.left_out += opened.left_out
    report.left_out.append(("the optimizer's state", "not weights"))
    report.notes.append(f"written by DeepSpeed with ZeRO {opened.stage} on {opened.world_size} rank(s)")
    return opened.weights


def _different(weights: Weights, files: list[Path], dtype: torch.dtype) -> list[str]:
    """Names of tensors that differ between the files and the checkpoint."""
    places: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    different = []
    for name, tensor in progress(
        weights.read(), total=len(weights.layout), desc="comparing", unit="tensor", delay=DELAY
    ):
        # The file is reopened for each tensor, so that pages of other tensors do not stay in memory.
        with safe_open(places[name], "pt") as file:
            written = file.get_tensor(name)
        expected = cast_floating(tensor, dtype).contiguous()
        same = written.dtype == expected.dtype and written.shape == expected.shape
        if not same or not torch.equal(_bytes(written), _bytes(expected)):
            different.append(name)
    return different


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, in which NaN equals itself."""
    return tensor.reshape(-1).view(torch.uint8)
