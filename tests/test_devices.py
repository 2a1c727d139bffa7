"""The choice of the device, with Apple's GPU as torch reports one. This machine need not have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launching import REPOSITORY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mobius_train.config import load
from mobius_train.devices import best_device, collective_device, device_name, usable_device
from mobius_train.errors import MobiusError
from mobius_train.job import distributed, environment
from mobius_train.job.environment import Launch
from mobius_train.pipeline import load_pipeline

MPS = torch.device("mps")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that torch has CUDA or an Apple GPU."""

    def has(cuda: bool = False, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setenv("DS_ACCELERATOR", "")

    return has


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_a_gpu_comes_first(machine: Any, cuda: bool, mps: bool, expected: str) -> None:
    machine(cuda, mps)
    assert best_device().type == expected


def test_a_device_that_is_not_there_is_refused(machine: Any) -> None:
    machine()
    assert usable_device(None) == usable_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "mps:3", "nothing"):
        with pytest.raises(MobiusError, match=f"device '{name}' cannot be used"):
            usable_device(name)


def test_no_library_exchanges_tensors_of_an_apple_gpu() -> None:
    assert collective_device(MPS) == torch.device("cpu")
    assert collective_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert (device_name(MPS), device_name(torch.device("cpu"))) == ("Apple GPU", "CPU")


@pytest.mark.parametrize(
    ("mps", "ranks", "given", "expected"),
    [
        (True, 1, "", "mps"),
        (True, 2, "", "cpu"),
        (True, 1, "cpu", "cpu"),
        (False, 1, "", "cpu"),
        (False, 1, "mps", "cpu"),
    ],
)
def test_one_rank_trains_on_an_apple_gpu(
    machine: Any, monkeypatch: pytest.MonkeyPatch, mps: bool, ranks: int, given: str, expected: str
) -> None:
    machine(mps=mps)
    monkeypatch.setenv("DS_ACCELERATOR", given)
    environment.choose_accelerator(ranks)
    assert environment.uses_mps() == (expected == "mps")
    assert distributed._device(Launch(0, 0, ranks, ranks)).type == expected


def test_a_cuda_gpu_needs_no_accelerator(machine: Any) -> None:
    machine(cuda=True, mps=True)
    environment.choose_accelerator()
    assert not environment.uses_mps()


def test_fsdp_is_refused_on_an_apple_gpu(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mobius_train.engine.choose import choose_engine
    from mobius_train.engine.spread import Spread

    config, spread = load(REPOSITORY / "configs" / "emoji.yaml"), Spread.over(1, "fsdp")
    machine()
    choose_engine(config, spread)
    monkeypatch.setenv("DS_ACCELERATOR", "mps")
    with pytest.raises(MobiusError, match="FSDP does not support Apple's GPUs: use --engine deepspeed"):
        choose_engine(config, spread)


class WithoutDoubles(TorchDispatchMode):
    """Refuses float64, which Apple's GPU does not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float64 for one in tree_leaves(out)):
            raise TypeError(f"{func} returns float64")
        return out


def test_sampling_needs_no_float64() -> None:
    pipeline = load_pipeline(REPOSITORY / "assets" / "emoji-motion", None)
    with WithoutDoubles():
        clips = pipeline(["red heart"], num_frames=2, height=32, width=32, num_inference_steps=2, output_type="uint8")
    assert clips.frames.shape == (1, 2, 3, 32, 32)
    with pytest.raises(TypeError, match="float64"), WithoutDoubles():
        torch.ones(2).double()
