"""Tiny .onnx models, written as the protobuf messages that they are (https://github.com/onnx/onnx, onnx.proto)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FLOAT = 1


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, FLOAT) + _field(2, dims)))


def _tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_field(1, size) for size in array.shape)
    return dims + _field(2, FLOAT) + _field(8, name) + _field(9, array.astype("<f4").tobytes())


def write(
    path: Path,
    inputs: dict[str, tuple[int, ...]],
    outputs: dict[str, tuple[int, ...]],
    nodes: list[tuple[str, list[str], str]],
    weights: dict[str, np.ndarray],
) -> Path:
    """nodes: (operator, names of inputs, name of output)."""
    graph = b"".join(
        _field(1, b"".join(_field(1, name) for name in names) + _field(2, output) + _field(4, operator))
        for operator, names, output in nodes
    )
    graph += _field(2, "graph") + b"".join(_field(5, _tensor(*weight)) for weight in weights.items())
    graph += b"".join(_field(11, _value(*value)) for value in inputs.items())
    graph += b"".join(_field(12, _value(*value)) for value in outputs.items())
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 17)))
    return path
