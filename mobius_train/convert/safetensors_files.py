"""Writing safetensors one tensor at a time, in several files above a size, as Hugging Face does.

The library's own writer needs all tensors of a file at once.
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

from mobius_train.convert.weights import Weights, cast
from mobius_train.errors import MobiusError
from mobius_train.files import finished_files, replace_file
from mobius_train.safetensors_header import DTYPES, lay_out


def write(weights: Weights, path: Path, dtype: torch.dtype, max_shard_size: str) -> list[Path]:
    """Write `path`, or NAME-00001-of-0000N.safetensors and an index beside it where that would be too large.

    Memory is that of one tensor. The files get their names when all of them are complete.

    Args:
        dtype: of floating-point tensors in the files; others keep theirs.
        max_shard_size: such as "5GB"; a larger tensor has a file of its own.

    Returns:
        The files, in the order of their names, without the index.

    Raises:
        MobiusError: a file cannot be written, or `weights` yields something else than its layout says.
    """
    wanted = {name: cast(tensor, dtype) for name, tensor in weights.layout.items()}
    foreign = [f"{name} ({tensor.dtype})" for name, tensor in wanted.items() if tensor.dtype not in DTYPES]
    if foreign:
        raise MobiusError(f"{foreign[0]}: tensors of this dtype cannot be written to {path}")
    pattern = path.name.removesuffix(".safetensors").replace("{", "{{").replace("}", "}}") + "{suffix}.safetensors"
    try:
        split = split_torch_state_dict_into_shards(wanted, filename_pattern=pattern, max_shard_size=max_shard_size)
    except ValueError as error:
        raise MobiusError(f"max_shard_size={max_shard_size!r} is no size: write 5GB or 500MB") from error
    files = {name: path.with_name(name) for name in sorted(split.filename_to_tensors)}
    try:
        with finished_files(list(files.values())) as temporaries, ExitStack() as stack:
            shards = {
                name: _Shard(
                    stack.enter_context(temporary.open("wb")),
                    {tensor: wanted[tensor] for tensor in split.filename_to_tensors[name]},
                )
                for name, temporary in zip(files, temporaries, strict=True)
            }
            for name, tensor in _expected(weights.read(), wanted, dtype):
                shards[split.tensor_to_filename[name]].put(name, tensor)
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                text = json.dumps(index, indent=2, sort_keys=True) + "\n"
                replace_file(path.with_name(f"{path.name}.index.json"), text)
    except OSError as error:
        raise MobiusError(f"cannot write {error.filename or path}: {error.strerror}") from error
    return list(files.values())


def _expected(
    tensors: Iterator[tuple[str, Tensor]], wanted: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors in their dtype, each once and each as announced."""
    outstanding = dict(wanted)
    for name, tensor in tensors:
        tensor = cast(tensor, dtype)
        meta = outstanding.pop(name, None)
        if meta is None or (meta.shape, meta.dtype) != (tensor.shape, tensor.dtype):
            raise MobiusError(
                f"{name!r} came twice, or is not what was announced: {tuple(tensor.shape)} {tensor.dtype}"
            )
        yield name, tensor
    if outstanding:
        raise MobiusError(f"{len(outstanding)} tensors never came, {next(iter(outstanding))!r} among them")


class _Shard:
    """A file whose layout is written first, and its tensors then, each at its place."""

    def __init__(self, file: IO[bytes], layout: dict[str, Tensor]) -> None:
        # The widest first, so that every tensor is aligned.
        ordered = sorted(layout.items(), key=lambda item: -item[1].element_size())
        plan = lay_out({name: (tensor.dtype, tensor.shape) for name, tensor in ordered}, {"format": "pt"})
        file.write(plan.header)
        file.truncate(plan.size)
        self._file, self._places = file, plan.places

    def put(self, name: str, tensor: Tensor) -> None:
        self._file.seek(self._places[name])
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
