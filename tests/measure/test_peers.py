"""The peers of the benchmark are diffusers' models of the same image model, and train their temporal layers alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peers
import pytest
import torch
from accelerate.state import AcceleratorState
from unets import tiny_unet

from mobius_train.conditions import Conditions
from mobius_train.config import RunConfig
from mobius_train.models import SerialUNet

SAMPLE, TEXT, TIMESTEP = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 40), torch.tensor([3, 700])


@pytest.fixture
def serial() -> Iterator[SerialUNet]:
    torch.manual_seed(0)
    yield SerialUNet.from_unet2d(tiny_unet("sd2")).eval()
    # accelerate keeps the precision of a process.
    AcceleratorState._reset_state(True)


def config(**fields: Any) -> RunConfig:
    values: dict[str, Any] = {"stage": "text-to-video", "mode": "serial", "output_dir": "x", "mixed_precision": "no"}
    return RunConfig.model_validate(
        values | {"data": {"train": "x"}, "pretrained_model_name_or_path": "x", "max_train_steps": 1} | fields
    )


def predicted(model: Any) -> torch.Tensor:
    with torch.no_grad():
        prediction: torch.Tensor = model.predict(SAMPLE, TIMESTEP, Conditions.of_text(TEXT))
    return prediction


def test_the_3d_unet_is_the_serial_model(serial: SerialUNet) -> None:
    for parameter in serial.temporal.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    peer = peers.unet3d(serial)
    assert torch.allclose(predicted(peers.denoiser_of(peer)), predicted(serial), atol=1e-4)
    peers.loop_of(peer, config())
    trained = {name for name, parameter in peer.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in serial.temporal.named_parameters()}


def test_animate_diff_trains_its_motion_modules(serial: SerialUNet) -> None:
    peer = peers.animate_diff(serial)
    own, model = predicted(serial), peers.denoiser_of(peer)
    # Without what they add it is the image model, which the new serial model is.
    assert not torch.allclose(predicted(model), own, atol=1e-4)
    for module in peer.temporal:
        torch.nn.init.zeros_(module.proj_out.weight)
        torch.nn.init.zeros_(module.proj_out.bias)
    assert torch.allclose(predicted(model), own, atol=1e-4)
    peers.loop_of(peer, config())
    trained = {name for name, parameter in peer.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in peer.model.named_parameters() if "motion_modules" in name}


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_loop_steps_after_the_accumulated_micro_batches(serial: SerialUNet, recomputed: bool) -> None:
    peer = peers.animate_diff(serial)
    loop = peers.loop_of(peer, config(gradient_accumulation_steps=2, gradient_checkpointing=recomputed))
    model, weight = peers.denoiser_of(peer), peer.temporal[0].proj_out.weight
    start = weight.detach().clone()

    def micro_batch() -> Any:
        prediction = model.predict(SAMPLE, TIMESTEP, Conditions.of_text(TEXT), trained=loop)
        loop.backward(prediction.square().mean())
        return loop.step(0.1)

    assert micro_batch() is None
    assert torch.equal(weight, start)
    assert micro_batch().gradient_norm > 0
    assert not torch.equal(weight, start)
    assert peer.model.down_blocks[0].gradient_checkpointing == recomputed
    assert all(parameter.grad is None for parameter in peer.model.parameters())
