"""The header of a safetensors file, for writers that cannot hold all tensors of a file at once.

A file is the length of the JSON text (8 bytes, little-endian), the JSON text with each tensor's dtype, shape and place,
padded with spaces to a multiple of 8, and the tensors' bytes without gaps (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

DTYPES = {
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


class Layout(NamedTuple):
    """A file's first bytes, and where its tensors lie."""

    header: bytes
    places: dict[str, int]
    """The byte of the file at which each tensor begins."""
    size: int
    """Bytes of the whole file."""


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str], compact: bool = True
) -> Layout:
    """Lay tensors out in the order given.

    Args:
        tensors: dtype and shape by name.
        metadata: texts that the file carries.
        compact: JSON without spaces, as the library writes it. Checkpoints of runs have them.

    Raises:
        KeyError: a dtype that the format has no name for.
    """
    records: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        records[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(records, separators=(",", ":") if compact else None).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {name: len(header) + start for name, start in starts.items()}, len(header) + end)
