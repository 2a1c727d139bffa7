"""Where the encoders are: with a latent cache, on the device for sampling alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import Run
from torch import Tensor

from mobius_train.conditions import MASK, SIZES, TEXT, Conditions
from mobius_train.data.batch import ClipBatch, EncodedBatch
from mobius_train.encoders.encoders import Cached, Encoders, Online
from mobius_train.encoders.image_encoder import Posterior
from mobius_train.sequence.group import SequenceGroup
from mobius_train.tasks.denoising import DiffusionTask


class Moved:
    """Records where the encoders are put."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        monkeypatch.setattr(Encoders, "move", lambda _, device, text=True: self.seen.append(f"{device} {text}"))


def test_a_cached_source_takes_the_encoders_off_the_device_after_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, encoders = Moved(monkeypatch), Encoders.__new__(Encoders)
    source = Cached({}, encoders, torch.device("cuda"), move_text=False)
    for _ in range(2):
        with source.encoders_on_device():
            assert moved.seen[-1] == "cuda False"
    with pytest.raises(OSError, match="disk"), source.encoders_on_device():
        raise OSError("disk full")
    assert moved.seen == ["cpu False", *("cuda False", "cpu False") * 3]


@pytest.mark.slow
def test_a_run_with_a_cache_has_them_on_the_device_only_while_it_validates(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Moved(monkeypatch)
    steps: list[int] = []
    loss = DiffusionTask.loss

    def counted(*arguments: object) -> torch.Tensor:
        # An odd number of moves: they have left as often as they came, and once before.
        steps.append(len(moved.seen))
        return loss(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DiffusionTask, "loss", counted)
    short: dict[str, Any] = {"validation": {"num_inference_steps": 1, "max_clips": 1}, "validation_steps": 1}
    run("cached", data={"cache_dir": str(tmp_path / "cache")}, max_train_steps=2, **short)
    # The first validation, of step 0, draws no samples.
    assert steps == [1, 3]
    assert len(moved.seen) == 5

    moved.seen.clear()
    run("online", max_train_steps=1, **short)
    assert moved.seen == []


def test_an_online_source_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved(monkeypatch)
    source = Online({}, Encoders.__new__(Encoders), torch.device("cuda"))
    with source.encoders_on_device():
        pass
    assert moved.seen == []


class Group(SequenceGroup):
    """One rank of a group; the other ranks' tensors are known from a run before."""

    def __init__(self, rank: int, gathered: list[list[Tensor]]) -> None:
        super().__init__(rank, len(gathered))
        self._gathered, self._calls_here = gathered, 0

    def _gather(self, tensor: Tensor) -> Tensor:
        number, self._calls_here = self._calls_here, self._calls_here + 1
        own = self._gathered[self.rank]
        if len(own) == number:
            own.append(tensor)
        return torch.stack([tensors[number] if len(tensors) > number else tensor for tensors in self._gathered])

    def _exchange(self, *_: Any) -> Any:
        raise AssertionError

    def _reduce(self, tensor: Tensor) -> Tensor:
        raise AssertionError


class Text:
    """Encodes a caption as its length."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, caption: str, where: str = "") -> Conditions:
        self.encoded.append(caption)
        mask = torch.tensor([len(caption) > 1, True])
        return Conditions({TEXT: torch.full((2, 3), float(len(caption))), MASK: mask})


class Images:
    device = torch.device("cpu")

    def posterior(self, frames: Tensor, sequence: SequenceGroup | None = None) -> Posterior:
        return Posterior(frames.float(), frames.float())


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_ranks_of_a_group_share_the_captions_of_a_batch(clips: int) -> None:
    captions = ["a" * (number + 1) for number in range(clips)]
    frames = torch.zeros(clips, 1, 3, 8, 16, dtype=torch.uint8)
    batch = ClipBatch(torch.arange(clips), [str(number) for number in range(clips)], captions, frames)

    def encode(group: SequenceGroup | None) -> tuple[EncodedBatch, list[str]]:
        text = Text()
        encoders = Encoders(Images(), text, frozenset({TEXT, MASK, SIZES}))  # type: ignore[arg-type]
        return encoders.encode_batch(batch, group), text.encoded

    alone, _ = encode(None)
    gathered: list[list[Tensor]] = [[], [], []]
    for rank in range(3):
        encode(Group(rank, gathered))
    seen: set[str] = set()
    for rank in range(3):
        shared, encoded = encode(Group(rank, gathered))
        assert len(encoded) == -(-clips // 3)  # as often on every rank
        seen |= set(encoded)
        assert shared.conditions.tensors.keys() == {TEXT, MASK, SIZES}
        for name, tensor in alone.conditions.tensors.items():
            assert torch.equal(shared.conditions[name], tensor)
            assert shared.conditions[name].dtype == tensor.dtype
    assert seen == set(captions)
