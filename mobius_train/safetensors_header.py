"""The header of a safetensors file, for writers that do not have all tensors in memory at once.

A file has three parts (huggingface.co/docs/safetensors): the length of the JSON text (8 bytes, little-endian), the JSON
text with each tensor's dtype, shape and offsets, padded with spaces to a multiple of 8, and the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class FileLayout(NamedTuple):
    """A file's header and the positions of its tensors."""

    header: bytes
    places: dict[str, int]
    """Offset in the file of each tensor."""
    size: int
    """Size of the file in bytes."""


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str], compact: bool = True
) -> FileLayout:
    """Lay out the tensors in the given order.

    Args:
        tensors: dtype and shape by name.
        metadata: texts stored in the header.
        compact: write JSON without spaces, as the library does. Checkpoints of runs have spaces.

    Raises:
        KeyError: the format does not support a dtype.
    """
    records: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        records[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(records, separators=(",", ":") if compact else None).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(header, {name: len(header) + start for name, start in starts.items()}, len(header) + end)
