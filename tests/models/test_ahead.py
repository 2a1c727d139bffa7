"""A micro-batch whose frozen branch runs ahead: the same numbers, and no feature lives longer than it must."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import token_models
import torch
from torch import Tensor, nn
from unets import batch_for, tiny_unet

from mobius_train.models import ParallelUNet
from mobius_train.models.ahead import SideStream, computed, one_ahead

SHAPES: list[dict[str, Any]] = [
    {},
    {"ring_width": 0.5, "fusion_depth": 1, "tail_temporal_layers": True},
    {"ring_width": 0.0, "fusion_depth": 1, "tail_temporal_layers": True},
    {"ring_width": 0.5, "fusion_depth": 1, "trained_tail": True},
]


def moved(model: Any) -> Any:
    """With a ring that is not at its start, in which the fusion is the identity on h."""
    torch.manual_seed(1)
    for parameter in model.ring.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def models() -> list[Any]:
    unets = [ParallelUNet.from_unet2d(tiny_unet("emoji"), **shape) for shape in SHAPES]
    return [*unets, *(token_models.parallel_of(token_models.tiny_model(kind)) for kind in ("sd3", "pixart"))]


def batch_of(model: Any) -> Any:
    return (batch_for if isinstance(model, ParallelUNet) else token_models.batch_for)(model.spatial)


def gradients(model: Any, prediction: Tensor) -> list[Tensor]:
    model.zero_grad()
    prediction.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.ring.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("number", range(len(SHAPES) + 2))
def test_predictions_and_gradients_are_the_same_bit_for_bit(number: int) -> None:
    model = moved(models()[number])
    given = batch_of(model).given()
    expected = model.predict(*given)
    of_expected = gradients(model, expected)
    # Two micro-batches are ahead, as in a training loop.
    ends = [model.begin(*given, ahead=True) for _ in range(2)]
    for end in ends:
        prediction = end(None)
        assert torch.equal(prediction, expected)
        for mine, theirs in zip(gradients(model, prediction), of_expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("ahead", [False, True])
def test_all_of_the_frozen_branch_has_run_before_the_ring_begins(ahead: bool) -> None:
    model = moved(models()[0])
    order: list[str] = []
    for name, module in (("frozen", model.spatial.up_blocks[-1].resnets[-1]), ("ring", model.ring.transformer_in)):
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    model.begin(*batch_of(model).given(), ahead=ahead)(None)
    assert order == (["frozen", "ring"] if ahead else ["ring", "frozen"])


def features(count: int, alive: list[weakref.ref[Tensor]]) -> Iterator[Tensor]:
    for _ in range(count):
        tensor = torch.zeros(1)
        alive.append(weakref.ref(tensor))
        yield tensor
        del tensor


def test_a_feature_is_freed_when_its_consumer_drops_it() -> None:
    alive: list[weakref.ref[Tensor]] = []
    stream = computed(features(3, alive))
    assert [one() is not None for one in alive] == [True] * 3
    first = next(stream)
    del first
    assert [one() is not None for one in alive] == [False, True, True]


def test_only_the_last_feature_is_kept_for_a_model_without_a_ring() -> None:
    alive: list[weakref.ref[Tensor]] = []
    stream = computed(features(3, alive), only_last=True)
    assert [one() is not None for one in alive] == [False, False, True]
    assert len(list(stream)) == 1


def test_one_more_is_made_than_given() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            yield number

    stream = one_ahead(numbers())
    assert (next(stream), made) == (0, [0, 1])
    assert (next(stream), made) == (1, [0, 1, 2])


def test_without_a_gpu_the_side_stream_is_the_current_one() -> None:
    with SideStream(torch.device("cpu")).running() as wait:
        result = torch.ones(2) + 1
    wait()
    assert result.tolist() == [2, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_side_stream_gives_the_same_gradients() -> None:
    model = moved(models()[1]).to("cuda")
    given = batch_of(model).given()
    given = (given[0].cuda(), given[1].cuda(), given[2].to(torch.device("cuda")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    expected = gradients(model, model.predict(*given))
    side = SideStream(torch.device("cuda"))
    for _ in range(3):
        with side.running() as wait:
            end = model.begin(*given, ahead=True)
        with side.running():
            other = model.begin(*given, ahead=True)
        wait()
        for mine, theirs in zip(gradients(model, end(None)), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        del other
    torch.use_deterministic_algorithms(False)
