"""Checkpoints of a few numbers, as any number of ranks would have written them; no engine is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mobius_train.checkpoint import folders, random_states
from mobius_train.checkpoint.format import CONFIG, MANIFEST, STATE, Manifest, State, random_file, shard_file
from mobius_train.checkpoint.saver import Identity
from mobius_train.checkpoint.shard import PinnedCopy
from mobius_train.engine.contents import Contents
from mobius_train.engine.protocol import Piece, Scalars
from mobius_train.files import write_file

SHAPES = {"ring.a": [5, 3], "ring.b": [7]}
DATA = {"clips and captions": "a" * 64, "seed": "2"}
IDENTITY = Identity("seed: 2\n", 8, "0" * 64, "some/backbone", {"torch": "2"}, DATA)


# Checkpoints need a part of an engine only, and their signatures say Engine.
_PartOfEngine: Any = object


class Numbers(_PartOfEngine):
    """The part of an engine that checkpoints need: `step` decides every number of its state."""

    def __init__(self, step: int = 0, precision: str = "no", use_ema: bool = True, shapes: Any = None) -> None:
        self._contents = Contents("numbers", 1, precision, use_ema, SHAPES if shapes is None else shapes)
        self.state = {
            name: torch.arange(math.prod(shape), dtype=torch.float32) + 100 * step + number / 8
            for number, (name, shape) in enumerate(self._contents.tensors().items())
        }
        self.step = step

    def contents(self) -> Contents:
        return self._contents

    def pieces(self, rank: int = 0, ranks: int = 1) -> dict[str, Piece]:
        """Equal parts of each tensor; the last ranks may have none of a short one."""
        pieces = {}
        for name, data in self.state.items():
            size = -(-len(data) // ranks)
            part = data[rank * size :][:size]
            if len(part):
                pieces[name] = Piece(tuple(self._contents.tensors()[name]), rank * size, part)
        return pieces

    def scalars(self) -> Scalars:
        return {"adam_step": self.step}

    def restore(self, fill: Callable[[str, Piece], None], scalars: Scalars) -> None:
        for name, piece in self.pieces().items():
            fill(name, piece)
        self.step = int(scalars["adam_step"])


def make(output_dir: Path, step: int, ranks: int = 2, shapes: Any = None, **changes: Any) -> Path:
    """output_dir/checkpoint-<step> of Numbers(step), which `latest` then names; `changes` are of its state.json."""
    engine, temporary = Numbers(step, shapes=shapes), folders.temporary_of(output_dir, step)
    temporary.mkdir(parents=True)
    state = State(
        {"step": step}, 8, ranks, engine.contents(), engine.scalars(), "0" * 64, "some/backbone", {"torch": "2"}, DATA
    )
    values = json.loads(state.dump()) | changes
    texts = {STATE: json.dumps(values), CONFIG: IDENTITY.config}
    for rank in range(ranks):
        texts[random_file(rank, ranks)] = json.dumps(random_states.take())
    files = {name: write_file(temporary / name, [text.encode()]) for name, text in texts.items()}
    for rank in range(ranks):
        host = PinnedCopy()
        host.take(engine.pieces(rank, ranks))
        files[shard_file(rank, ranks)] = host.write(temporary / shard_file(rank, ranks))
    write_file(temporary / MANIFEST, [Manifest(step, files).dump().encode()])
    folders.publish(output_dir, step)
    return folders.folder_of(output_dir, step)


def seal(folder: Path) -> None:
    """Write a manifest that agrees with the files as they are now, as someone who means harm would."""
    files = {
        path.name: write_file(path, [path.read_bytes()]) for path in sorted(folder.iterdir()) if path.name != MANIFEST
    }
    write_file(folder / MANIFEST, [Manifest(folders.step_of(folder), files).dump().encode()])
