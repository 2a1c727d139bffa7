"""Models as .onnx files, run with onnxruntime, a dependency of the OCR."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import onnxruntime

from mobius_train.errors import MobiusError

CPU = "CPUExecutionProvider"


def check(path: Path, inputs: int) -> None:
    """
    Raises:
        MobiusError: the file is not a model, or has another number of inputs.
    """
    names = [value.name for value in _read(path, [CPU]).get_inputs()]
    if len(names) != inputs:
        raise MobiusError(f"{path} has {len(names)} inputs ({', '.join(names)}); a model with {inputs} is required")


@lru_cache(maxsize=4)
def session(path: Path) -> Any:
    """The model, on a GPU if onnxruntime supports one, with one thread, because parts run in parallel."""
    return _read(
        path, [name for name in ("CUDAExecutionProvider", CPU) if name in onnxruntime.get_available_providers()]
    )


def size(path: Path, smallest: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the model's first input; a dynamic side is `smallest` rounded up to a multiple of 8."""
    shape = session(path).get_inputs()[0].shape[-2:]
    free = (-(-side // 8) * 8 for side in smallest)
    height, width = (given if isinstance(given, int) else side for given, side in zip(shape, free, strict=True))
    return height, width


def _read(path: Path, providers: list[str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has a separate class for each of its codes
        raise MobiusError(f"onnxruntime cannot read the model {path}: {error}") from error
