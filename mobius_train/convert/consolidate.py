"""From a sharded training checkpoint to one safetensors file, without GPUs and with the memory of one tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.convert import distributed_checkpoint, zero
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.run_checkpoint import MODEL, find_run_checkpoint, weights_of
from mobius_train.convert.safetensors_files import write
from mobius_train.convert.weights import Weights, cast
from mobius_train.errors import MobiusError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def consolidate(
    source: Path,
    destination: Path,
    dtype: torch.dtype = torch.float32,
    weights: str = MODEL,
    tag: str | None = None,
    max_shard_size: str = "5GB",
) -> Report:
    """Write the whole weights of a checkpoint, and read them back.

    Args:
        source: a run's folder or one of its checkpoints; or a folder of DeepSpeed (ZeRO 1 to 3) or of
            torch.distributed.checkpoint (FSDP).
        destination: NAME.safetensors; several files and an index where it would be larger than `max_shard_size`.
        dtype: of floating-point tensors.
        weights: which entry of the checkpoint: a run has "model", and "ema" with use_ema; DeepSpeed has "model" alone.
        tag: which checkpoint of a folder with several; none: the one that its file `latest` names.

    Raises:
        MobiusError: the source is damaged, incomplete, of another kind or asks for code, naming the file; or the
            destination exists, or cannot be written.
    """
    if destination.suffix != ".safetensors":
        raise MobiusError(f"the output {destination} must be named NAME.safetensors")
    stem = destination.name.removesuffix(".safetensors")
    present = [p for p in (destination, *destination.parent.glob(f"{stem}-*-of-*.safetensors")) if p.exists()]
    if present:
        raise MobiusError(f"{present[0]} exists: choose another output, or remove it")
    report = Report(source, destination)
    opened = open_weights(source, weights, tag, report)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MobiusError(f"cannot make the folder of {destination}: {error.strerror}") from error
    files = write(opened, destination, dtype, max_shard_size)
    size = sum(file.stat().st_size for file in files)
    where = files[0].name if len(files) == 1 else f"{len(files)} files and {destination.name}.index.json"
    report.mapped.append((f"{len(opened.layout)} tensors", f"{where}, {dtype}, {size / 1e6:.1f} MB"))
    different = _different(opened, files, dtype)
    report.require(not different, f"{len(opened.layout)} tensors read back equal the checkpoint's, bit for bit")
    report.problems += [f"{name} differs" for name in different]
    if different:
        for file in (*files, destination.with_name(f"{destination.name}.index.json")):
            file.unlink(missing_ok=True)
    report.raise_problems()
    return report


def open_weights(source: Path, weights: str, tag: str | None, report: Report) -> Weights:
    """The weights of a checkpoint folder of any known kind; what it holds beside them goes into the report.

    Raises:
        MobiusError: see `consolidate`.
    """
    if not source.is_dir():
        raise MobiusError(f"there is no folder {source}")
    mine = find_run_checkpoint(source, tag)
    if mine is not None:
        checkpoint = open_checkpoint(mine)
        report.left_out.append(("the optimizer's state", "not weights"))
        report.notes.append(f"step {checkpoint.state.progress['step']}, of {checkpoint.state.world_size} rank(s)")
        return weights_of(checkpoint, weights)
    if (source / distributed_checkpoint.METADATA).is_file():
        sharded = distributed_checkpoint.open_distributed(source, weights)
        report.left_out += sharded.left_out
        return sharded.weights
    folder = zero.find_tag(source, tag)
    if folder is None:
        raise MobiusError(
            f"{source} is no checkpoint of a known kind: a run's has a manifest.json, DeepSpeed's a file `latest` or"
            " the ranks' *_optim_states.pt (give --tag where there are several), that of torch.distributed.checkpoint"
            " a .metadata"
        )
    if weights != MODEL:
        raise MobiusError(f"{folder} was written by DeepSpeed, which saves no {weights!r}: its weights are {MODEL!r}")
    opened = zero.open_zero(folder)
    report.left_out += opened.left_out
    report.left_out.append(("the optimizer's state", "not weights"))
    report.notes.append(f"written by DeepSpeed under ZeRO {opened.stage} on {opened.world_size} rank(s)")
    return opened.weights


def _different(weights: Weights, files: list[Path], dtype: torch.dtype) -> list[str]:
    """Names of tensors that are other in the files than in the checkpoint."""
    places: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    different = []
    for name, tensor in weights.read():
        # Opened anew for each tensor, so that the pages of the others do not stay in memory.
        with safe_open(places[name], "pt") as file:
            written = file.get_tensor(name)
        expected = cast(tensor, dtype).contiguous()
        same = written.dtype == expected.dtype and written.shape == expected.shape
        if not same or not torch.equal(_bytes(written), _bytes(expected)):
            different.append(name)
    return different


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """NaN is equal to itself as bytes."""
    return tensor.reshape(-1).view(torch.uint8)
