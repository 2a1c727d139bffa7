"""The layout of a folder checkpoint-<n>, and its two JSON files.

    manifest.json                       bytes and SHA-256 of every other file; written last
    state.json                          progress of the run, and the settings that its state depends on
    config.yaml                         the resolved recipe
    rank-00000-of-00004.safetensors     a rank's share of weights, moments and average, see shard.py
    random-00000-of-00004.json          a rank's random states

The file `latest`, next to these folders, contains the name of one of them. No file is a pickle.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mobius_train.engine.contents import Contents
from mobius_train.errors import MobiusError
from mobius_train.files import File, read_small_json

FORMAT = 1
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Kind = TypeVar("Kind")
NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
# The trained weights of a checkpoint, and their moving average, as commands name them.
MODEL, EMA = "model", "ema"


@dataclass(frozen=True)
class Manifest:
    """All files of a checkpoint except the manifest itself."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: Count
    files: dict[str, File]

    def dump(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            MobiusError: the file is missing or not a valid manifest.
        """
        path = folder / MANIFEST
        values = read_json(path)
        if values.get("format") != FORMAT:
            raise MobiusError(f"{path}: format {values.get('format')!r} is not supported, this version reads {FORMAT}")
        return _typed(Manifest, {name: value for name, value in values.items() if name != "format"}, path)


@dataclass(frozen=True)
class State:
    """The state of the run, without its tensors.

    Attributes:
        progress: counters of the training loop, with the key step.
        global_batch_size: samples per optimizer step.
        scalars: the engine's state that is not in tensors.
        frozen_sha256: hash of the frozen weights, which are not saved.
        frozen_source: folder or hub name of the frozen weights.
        data: everything that decides which samples come in which order; None in checkpoints of older versions.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    progress: dict[str, Count]
    global_batch_size: Positive
    world_size: Positive
    contents: Contents
    scalars: dict[str, int | float]
    frozen_sha256: str
    frozen_source: str | None
    versions: dict[str, str]
    data: dict[str, str] | None = None

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def read(folder: Path) -> State:
        """Read the state of a checkpoint.

        Raises:
            MobiusError: the file is missing or not a valid state.
        """
        state = _typed(State, read_json(folder / STATE), folder / STATE)
        if "step" not in state.progress:
            raise MobiusError(f"{folder / STATE}: its progress has no step")
        return state


def _typed(kind: type[Kind], values: dict[str, Any], path: Path) -> Kind:
    """Return the values as a dataclass, after a check of every type at every depth.

    Raises:
        MobiusError: a value is missing, unknown, or of another type; the message names the first of them.
    """
    try:
        # In JSON mode, because strict validation of Python values takes dataclasses only.
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        raise MobiusError(f"{path}: {where}: {first['msg']} ({error.error_count()} unexpected values)") from error
    except (ValueError, RecursionError) as error:
        raise MobiusError(f"{path}: not readable ({type(error).__name__})") from error


def shard_file(rank: int, world_size: int) -> str:
    """Return the name of a rank's tensor file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def random_file(rank: int, world_size: int) -> str:
    """Return the name of a rank's file of random states."""
    return f"random-{rank:05d}-of-{world_size:05d}.json"


def files_of(world_size: int) -> set[str]:
    """Return the names of all files of a checkpoint except the manifest."""
    ranks = range(world_size)
    return {STATE, CONFIG, *(f(rank, world_size) for f in (shard_file, random_file) for rank in ranks)}


def step_of(folder: Path) -> int:
    """Return n of checkpoint-<n>."""
    return int(folder.name.rpartition("-")[2])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        MobiusError: the file cannot be read, or is not a JSON object.
    """
    try:
        values = read_small_json(path)
    except OSError as error:
        raise MobiusError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MobiusError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise MobiusError(f"{path}: not a JSON object")
    return values
