"""Reading pickles of strangers without running what is in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mobius_train.errors import MobiusError

# What torch and the pickle module raise on files that are damaged or not theirs.
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
    """What torch.save wrote: tensors, which stay on disk until they are used, in plain containers.

    Args:
        stand_ins: further types that the file may name, and what is made of them: an object with their fields.

    Raises:
        MobiusError: the file is damaged, or names anything else. Nothing of it has run then.
    """
    try:
        with torch.serialization.safe_globals([(kind, name) for name, kind in (stand_ins or {}).items()]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> MobiusError:
    """The error that names the file, and says in one line what is wrong with it."""
    reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
    if "nsupported" in reason or "forbidden" in reason:
        return MobiusError(
            f"{path} is refused: it is a pickle that asks for code beside tensors ({reason}), and nothing of it was"
            " run. Get the weights as safetensors, or from a source that you can make write plain tensors"
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MobiusError(f"{path} cannot be read: {first[:300]}. It is damaged, cut short, or of another kind")


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles objects of the given types alone; any other name in the pickle is an error, before it is looked up."""

    def __init__(self, file: Any, allowed: dict[str, Any]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"forbidden global {module}.{name}") from None
