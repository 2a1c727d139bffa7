"""Started on several ranks by test_engines.py: goes on from what other ranks and engines saved in engine_worker.py.

    moves_worker.py <ds_configs> <folder> <move>[,<move>...]

A move is <source>><engine>, and a source <ranks>-<engine>-<precision>, a run folder that engine_worker.py left. Rank 0
writes <folder>/<world size>-moves.json: the numbers that were seen, by the move.
"""

from __future__ import annotations

# ruff: noqa: I001 (the worker comes first)

import json
import sys
from pathlib import Path
from typing import Any

from engine_worker import IDENTITY, SAVED_STEP, STEPS, difference, launch, make, step  # first: it sets the environment

import torch

from mobius_train.checkpoint.read import Checkpoint, open_checkpoint
from mobius_train.checkpoint.resume import find, resume
from mobius_train.cli import run_rank
from mobius_train.job.distributed import Distributed
from mobius_train.engine.protocol import Piece


def _piece_difference(checkpoint: Checkpoint, name: str, piece: Piece) -> float:
    saved = piece._replace(data=torch.full_like(piece.data, torch.nan))
    checkpoint.fill(name, saved)
    return float((saved.data - piece.data).abs().max())


def main() -> None:
    folder, moves = Path(sys.argv[2]), sys.argv[3].split(",")
    distributed = Distributed(launch)
    seen = {}
    for move in moves:
        source, _, name = move.partition(">")
        saved = find(folder / source, "latest", distributed)
        assert saved is not None
        checkpoint = open_checkpoint(saved)
        weights, averages = dict(checkpoint.weights()), dict(checkpoint.weights(averaged=True))
        engine = make(name, source.rpartition("-")[2], distributed, seed=7)
        mine: dict[str, Any] = {"difference_before_loading": difference(engine.weights(), weights)}
        resume(saved, engine, IDENTITY, distributed)
        mine["weights_difference"] = difference(engine.weights(), weights)
        mine["average_difference"] = difference(engine.averaged_weights(), averages)
        pieces = {n: _piece_difference(checkpoint, n, piece) for n, piece in engine.pieces().items()}
        mine["piece_differences"] = pieces
        mine["scalars"], mine["saved_scalars"] = engine.scalars(), checkpoint.state.scalars
        mine["losses"] = [step(engine, number, distributed)[0] for number in range(SAVED_STEP, STEPS)]
        seen[move] = mine
        engine.close()
    if distributed.is_main:
        (folder / f"{distributed.world_size}-moves.json").write_text(json.dumps(seen))
    distributed.close()


if __name__ == "__main__":
    run_rank(main)
