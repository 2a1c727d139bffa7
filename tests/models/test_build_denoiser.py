from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn
from unets import batch_for, tiny_unet

from mobius_train.config import Mode
from mobius_train.errors import MobiusError
from mobius_train.models import ImageUNet, ParallelUNet, SerialUNet, build_denoiser
from mobius_train.models.recompute import LayerMemory

Stage = Literal["text-to-image", "text-to-video"]


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def names(module: nn.Module, prefix: str) -> set[str]:
    return {name for name, _ in module.named_parameters() if name.startswith(prefix)}


@pytest.mark.parametrize("frozen_before", [False, True])
def test_what_each_mode_trains(frozen_before: bool) -> None:
    def build(stage: Stage, mode: Mode) -> Any:
        unet = tiny_unet("emoji").requires_grad_(not frozen_before)
        return build_denoiser(unet, stage, mode)

    parallel = build("text-to-video", "parallel")
    assert isinstance(parallel, ParallelUNet)
    assert parallel.trained is parallel.ring
    assert parallel.frozen is parallel.spatial
    assert trained(parallel) == names(parallel, "ring.")

    serial = build("text-to-video", "serial")
    assert isinstance(serial, SerialUNet)
    assert serial.trained is serial
    assert serial.frozen is None
    assert trained(serial) == names(serial, "temporal.")

    full = build("text-to-video", "full")
    assert isinstance(full, SerialUNet)
    assert trained(full) == names(full, "")

    image = build("text-to-image", "parallel")
    assert isinstance(image, ImageUNet)
    assert trained(image) == names(image, "")


@pytest.mark.parametrize(
    ("stage", "mode", "gradient_checkpointing"),
    [
        ("text-to-image", "parallel", False),
        ("text-to-video", "parallel", False),
        ("text-to-video", "parallel", True),
        ("text-to-video", "serial", True),
        ("text-to-video", "full", False),
    ],
)
def test_an_engine_in_place_of_the_trained_module_gets_the_gradient(
    stage: Stage, mode: Mode, gradient_checkpointing: bool
) -> None:
    class Engine(nn.Module):
        """Calls what it wraps as it was called, like DeepSpeed's and DDP's."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.module(*args, **kwargs)

    unet = tiny_unet("emoji")
    model = build_denoiser(unet, stage, mode)
    model.set_memory(LayerMemory(gradient_checkpointing))
    batch = batch_for(unet)
    engine = Engine(model.trained)
    prediction = model.predict(*batch.given(), trained=engine)
    assert engine.calls == 1
    assert prediction.shape == batch.sample.shape
    assert torch.equal(prediction, model.predict(*batch.given()))
    prediction.square().mean().backward()
    assert all(p.grad is not None for p in engine.parameters() if p.requires_grad)


def test_unsupported_backbones_are_refused_before_anything_is_built() -> None:
    with pytest.raises(MobiusError, match="num_class_embeds"):
        build_denoiser(tiny_unet("emoji", num_class_embeds=3), "text-to-video", "parallel")


@pytest.mark.parametrize("mode", ["parallel", "serial", "full"])
def test_a_video_model_goes_on_in_its_own_mode(mode: Mode) -> None:
    model = (ParallelUNet if mode == "parallel" else SerialUNet).from_unet2d(tiny_unet("sd1"))
    denoiser: Any = build_denoiser(model, "text-to-video", mode)
    assert denoiser is model
    fresh: Any = build_denoiser(tiny_unet("sd1"), "text-to-video", mode)
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert {name for name, p in denoiser.named_parameters() if p.requires_grad} == trained
    assert denoiser.training
    others: tuple[tuple[Stage, Mode], ...] = (
        ("text-to-image", mode),
        ("text-to-video", "serial" if mode == "parallel" else "parallel"),
    )
    for stage, other in others:
        with pytest.raises(MobiusError, match=f"stage='{stage}' and mode='{other}'"):
            build_denoiser(model, stage, other)
