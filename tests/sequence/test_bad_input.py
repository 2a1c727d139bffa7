"""What cannot be shared is refused by name, before models load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import recipe, write
from torch import nn
from unets import tiny_unet

from mobius_train.config import load
from mobius_train.encoders.fit import check_positions
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.models import ParallelUNet
from mobius_train.models.unet.ring import Ring
from mobius_train.sequence.group import SimulatedGroup

VAE = {"latent_channels": 4, "block_out_channels": [1] * 4, "scaling_factor": 1.0}


def config(tmp_path: Path, **changes: Any) -> Any:
    return load(write(tmp_path / "recipe.yaml", recipe(tmp_path, tmp_path, tmp_path / "out", **changes)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        # A batch has enough frames, but the last held-out batch may be one clip.
        ({"train_batch_size": 4, "sequence_parallel_size": 8}, ("sequence_parallel_size=8", "only 4")),
        ({"compile": True, "sequence_parallel_size": 2}, ("compile=true", "sequence_parallel_size=2")),
        (
            {"stage": "text-to-image", "data": {"num_frames": 1}, "sequence_parallel_size": 2},
            ("text-to-image", "sequence_parallel_size=2"),
        ),
        ({"sequence_parallel_size": 0}, ("sequence_parallel_size", "1")),
    ],
)
def test_recipes(tmp_path: Path, changes: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(MobiusError) as error:
        config(tmp_path, **changes)
    assert all(part in str(error.value) for part in named)


def test_ranks(tmp_path: Path) -> None:
    shared = config(tmp_path, sequence_parallel_size=4)
    with pytest.raises(MobiusError, match=r"=4 does not divide the 6 rank.*1, 2, 3, 6"):
        Spread.over(6).check(shared)
    with pytest.raises(MobiusError, match=r"a node has 2 rank.*sequence_across_nodes"):
        Spread.over(8, ranks_per_node=2).check(shared)
    Spread.over(8, ranks_per_node=2).check(shared.model_copy(update={"sequence_across_nodes": True}))
    Spread.over(8, ranks_per_node=4).check(shared)


def test_the_global_batch_counts_groups(tmp_path: Path) -> None:
    shared = config(tmp_path, sequence_parallel_size=2, train_batch_size=3, global_batch_size=12)
    Spread.over(8).check(shared)
    with pytest.raises(MobiusError, match="sequence_parallel_size=2 = 6"):
        Spread.over(4).check(shared)


def test_positions_of_the_deepest_level() -> None:
    unet = tiny_unet("emoji")
    # Three levels behind an autoencoder that divides by 8.
    check_positions((64, 64), unet, VAE, ranks=4)
    with pytest.raises(MobiusError, match=r"=5.*64 x 64.*only 4"):
        check_positions((64, 64), unet, VAE, ranks=5)


class Whole(Ring):
    """A ring that cannot be shared."""

    def forward(self, features: Any, num_frames: int, tail: Any = None) -> torch.Tensor:  # type: ignore[override]
        raise NotImplementedError


def test_a_ring_without_shares() -> None:
    unet = tiny_unet("emoji")
    model = ParallelUNet.from_unet2d(unet)
    nn.Module.__setattr__(model, "ring", Whole.from_unet2d(unet))
    with pytest.raises(MobiusError, match="Whole cannot be shared"):
        model.set_sequence(SimulatedGroup(0, 2))
