"""Where the encoders are: with a latent cache, on the device for sampling alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import Run

from mobius_train.encoders.encoders import Cached, Encoders, Online
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
