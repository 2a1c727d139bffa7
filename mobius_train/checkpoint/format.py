"""What lies in a folder checkpoint-<n>, and the two JSON files that describe it.

    manifest.json                       bytes and SHA-256 of every other file; written last
    state.json                          where the run stood, and what its state belongs to
    config.yaml                         the resolved recipe
    rank-00000-of-00004.safetensors     a rank's share of weights, moments and average, see shard.py
    random-00000-of-00004.json          a rank's random states

Beside these folders, the file `latest` names one of them. Nothing is a pickle.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobius_train.engine.contents import Contents
from mobius_train.errors import MobiusError
from mobius_train.files import File

FORMAT = 1
NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")
MANIFEST, STATE, CONFIG, LATEST = "manifest.json", "state.json", "config.yaml", "latest"


@dataclass(frozen=True)
class Manifest:
    """All files of a checkpoint but the manifest itself."""

    step: int
    files: dict[str, File]

    def dump(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """
        Raises:
            MobiusError: it is missing, or not as it was written.
        """
        path = folder / MANIFEST
        values = read_json(path)
        if values.get("format") != FORMAT:
            raise MobiusError(f"{path}: format {values.get('format')!r}, and this version reads {FORMAT}")
        try:
            files = {name: File(**file) for name, file in values["files"].items()}
            manifest = Manifest(values["step"], files)
        except (KeyError, TypeError, AttributeError) as error:
            raise MobiusError(f"{path}: not a manifest ({error!r})") from error
        if json.loads(manifest.dump()) != values:
            raise MobiusError(f"{path}: it holds more than a manifest does")
        return manifest


@dataclass(frozen=True)
class State:
    """Where the run stood.

    Attributes:
        progress: of the training loop, as JSON values.
        global_batch_size: samples of an optimizer step.
        scalars: of the engine, beside its tensors.
        frozen_sha256: identifies the frozen weights that the trained ones belong to, and that are not saved.
        frozen_source: the folder or hub name that these came from.
    """

    progress: dict[str, Any]
    global_batch_size: int
    world_size: int
    contents: Contents
    scalars: dict[str, int | float]
    frozen_sha256: str
    frozen_source: str | None
    versions: dict[str, str]

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def read(folder: Path) -> State:
        """
        Raises:
            MobiusError: it is missing, or not as it was written.
        """
        values = read_json(folder / STATE)
        try:
            return State(**values | {"contents": Contents(**values["contents"])})
        except (KeyError, TypeError) as error:
            raise MobiusError(f"{folder / STATE}: not a state ({error!r})") from error


def shard_file(rank: int, world_size: int) -> str:
    """The name of a rank's tensors."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def random_file(rank: int, world_size: int) -> str:
    """The name of a rank's random states."""
    return f"random-{rank:05d}-of-{world_size:05d}.json"


def files_of(world_size: int) -> set[str]:
    """The files of a checkpoint, the manifest apart."""
    ranks = range(world_size)
    return {STATE, CONFIG, *(f(rank, world_size) for f in (shard_file, random_file) for rank in ranks)}


def step_of(folder: Path) -> int:
    """n of checkpoint-<n>."""
    return int(folder.name.rpartition("-")[2])


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        MobiusError: the file cannot be read, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MobiusError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MobiusError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise MobiusError(f"{path}: not a JSON object")
    return values
