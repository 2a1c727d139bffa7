"""Reading of untrusted pickles without running code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mobius_train.errors import MobiusError

# Errors that torch and pickle raise on damaged or foreign files.
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    AssertionError,
    ImportError,
    MemoryError,
    OverflowError,
    RecursionError,
    UnicodeDecodeError,
    pickle.PickleError,
)


def load_tensors(path: Path, stand_ins: Mapping[str, type] | None = None) -> Any:
    """Load a torch.save file of tensors in plain containers, memory-mapped unless torch before 1.6 wrote it.

    Args:
        stand_ins: maps further type names that the file may contain to the types that replace them.

    Raises:
        MobiusError: the file is damaged or names other types. No code of it is run.
    """
    try:
        with torch.serialization.safe_globals([(kind, name) for name, kind in (stand_ins or {}).items()]):
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except UNREADABLE as error:
        raise unreadable_file(path, error) from error


def unreadable_file(path: Path, error: BaseException) -> MobiusError:
    """The error for a file that cannot be read, with its name and a one-line reason."""
    reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
    if "nsupported" in reason or "forbidden" in reason:
        return MobiusError(
            f"{path} is refused: it is a pickle that contains code in addition to tensors ({reason}); none of it was"
            " run. Get the weights as safetensors, or save them again as plain tensors"
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MobiusError(f"{path} cannot be read: {first[:300]}. It is damaged, truncated or of another kind")


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles only objects of the given types. Any other name is an error and is never imported."""

    def __init__(self, file: Any, allowed: dict[str, Any]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"forbidden global {module}.{name}") from None
