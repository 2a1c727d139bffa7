"""Writing of safetensors one tensor at a time, split into files by size in Hugging Face's format.

The safetensors library needs all tensors of a file in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from mobius_train.bars import DELAY, progress
from mobius_train.convert.lazy_weights import Weights, cast_floating
from mobius_train.errors import MobiusError
from mobius_train.files import finished_files, replace_file
from mobius_train.safetensors_header import DTYPE_NAMES, lay_out


def write_safetensors(weights: Weights, path: Path, dtype: torch.dtype, max_shard_size: str) -> list[Path]:
    """Write `path`, or NAME-00001-of-0000N.safetensors and an index if the file would be too large.

    Only one tensor is in memory at a time. The files get their names once all of them are complete.

    Args:
        dtype: dtype of floating-point tensors in the files; other tensors keep theirs.
        max_shard_size: such as "5GB"; a larger tensor gets its own file.

    Returns:
        The files sorted by name, without the index.

    Raises:
        MobiusError: a file cannot be written, or `weights` yields tensors that do not match its layout.
    """
    layout = {name: cast_floating(tensor, dtype) for name, tensor in weights.layout.items()}
    unsupported = [f"{name} ({tensor.dtype})" for name, tensor in layout.items() if tensor.dtype not in DTYPE_NAMES]
    if unsupported:
        raise MobiusError(f"{unsupported[0]}: tensors of this dtype cannot be written to {path}")
    pattern = path.name.removesuffix(".safetensors").replace("{", "{{").replace("}", "}}") + "{suffix}.safetensors"
    try:
        split = split_torch_state_dict_into_shards(layout, filename_pattern=pattern, max_shard_size=max_shard_size)
    except ValueError as error:
        raise MobiusError(f"max_shard_size={max_shard_size!r} is not a size: use a form like 5GB or 500MB") from error
    files = {name: path.with_name(name) for name in sorted(split.filename_to_tensors)}
    try:
        with finished_files(list(files.values())) as temporaries, ExitStack() as stack:
            shards = {
                name: _Shard(
                    stack.enter_context(temporary.open("wb")),
                    {tensor: layout[tensor] for tensor in split.filename_to_tensors[name]},
                )
                for name, temporary in zip(files, temporaries, strict=True)
            }
            total = sum(tensor.nbytes for tensor in layout.values())
            with progress(total=total, desc=f"writing {path.name}", unit="B", unit_scale=True, delay=DELAY) as bar:
                for name, tensor in _checked(weights.read(), layout, dtype):
                    shards[split.tensor_to_filename[name]].put(name, tensor)
                    bar.update(tensor.nbytes)
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                text = json.dumps(index, indent=2, sort_keys=True) + "\n"
                replace_file(path.with_name(f"{path.name}.index.json"), text)
    except OSError as error:
        raise MobiusError(f"cannot write {error.filename or path}: {error.strerror}") from error
    return list(files.values())


def _checked(
    tensors: Iterator[tuple[str, Tensor]], layout: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Cast the tensors, and check that each comes once and matches the layout."""
    outstanding = dict(layout)
    for name, tensor in tensors:
        tensor = cast_floating(tensor, dtype)
        meta = outstanding.pop(name, None)
        if meta is None or (meta.shape, meta.dtype) != (tensor.shape, tensor.dtype):
            raise MobiusError(
                f"{name!r} occurs twice, or does not match its layout: {tuple(tensor.shape)} {tensor.dtype}"
            )
        yield name, tensor
    if outstanding:
        raise MobiusError(f"{len(outstanding)} tensors are missing, {next(iter(outstanding))!r} among them")


class _Shard:
    """A file whose header is written first and whose tensors are then written at their positions, in any order."""

    def __init__(self, file: IO[bytes], layout: dict[str, Tensor]) -> None:
        # Tensors of the widest dtype come first, which aligns every tensor.
        ordered = sorted(layout.items(), key=lambda item: -item[1].element_size())
        plan = lay_out({name: (tensor.dtype, tensor.shape) for name, tensor in ordered}, {"format": "pt"})
        file.write(plan.header)
        file.truncate(plan.size)
        self._file, self._places = file, plan.places

    def put(self, name: str, tensor: Tensor) -> None:
        self._file.seek(self._places[name])
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
