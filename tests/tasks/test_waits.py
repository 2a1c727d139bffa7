"""How often the host waits for the device in a step. On a CPU nothing waits, and nothing is copied."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from launching import launch
from recipes import OWN_TEXT, Run, recipe, write

from mobius_train.conditions import Conditions
from mobius_train.data.batch import EncodedBatch
from mobius_train.devices import Arriving, sent
from mobius_train.job.distributed import Distributed
from mobius_train.job.environment import Launch

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3.0)
    assert sent(tensor, CPU) is tensor
    assert sent(tensor, CPU, torch.bfloat16).dtype == torch.bfloat16
    assert Arriving(torch.tensor(1.5)).value() == 1.5
    batch = EncodedBatch(torch.tensor([4]), ["a"], tensor, tensor + 1, Conditions.of_text(tensor + 2))
    moved = batch.to(CPU)
    assert moved.mean is batch.mean
    assert moved.std is batch.std
    assert moved.conditions["text"] is batch.conditions["text"]
    assert moved.keys is batch.keys
    assert moved.sample_index is batch.sample_index


def test_means_of_one_rank_are_its_values(process_group: None) -> None:
    with Distributed(Launch(rank=0, local_rank=0, world_size=1, local_world_size=1)) as distributed:
        values = {"loss": 0.1, "stopping": 1.0}
        assert distributed.mean(values) == values


@pytest.mark.slow
def test_deepspeed_waits_for_no_device_by_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise no work on another stream could overlap with the ring."""
    from deepspeed import get_accelerator

    callers: list[str] = []
    synchronize = lambda *_: callers.append(sys._getframe(1).f_code.co_name)  # noqa: E731
    monkeypatch.setattr(type(get_accelerator()), "synchronize", synchronize)
    run(max_train_steps=4)
    # Engines wait when they are destroyed: this one, and perhaps one of an earlier test.
    assert set(callers) == {"destroy"}


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("frozen_ahead", [False, True])
def test_on_a_gpu_the_host_waits_once_in_a_step(
    small_pipeline: Path, clips_folder: Path, tmp_path: Path, frozen_ahead: bool
) -> None:
    data = {"cache_dir": str(tmp_path / "cache")}
    values = recipe(small_pipeline, clips_folder, tmp_path / "out", frozen_ahead=frozen_ahead, data=data, **OWN_TEXT)
    path = write(tmp_path / "recipe.yaml", values)
    result = launch(1, Path(__file__).with_name("waits_worker.py"), str(path), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-2:] == ["1", "1"]
