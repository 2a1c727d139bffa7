"""Invariant 4: the serial model equals diffusers' UNet3DConditionModel on the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from autograd_memory import result_and_held
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from kinds import EVEN, ODD, each_kind_in_one_size, two_kinds
from torch import nn
from unets import batch_for, serial_with_random_temporal_layers, tiny_unet

from mobius_train.config import Mode
from mobius_train.errors import MobiusError
from mobius_train.models import ParallelUNet, SerialUNet, build_denoiser, weights_hash


def tiny_unet3d(**changes: Any) -> UNet3DConditionModel:
    torch.manual_seed(0)
    config = {
        "block_out_channels": (32, 64, 64),
        "norm_num_groups": 16,
        "cross_attention_dim": 24,
        "attention_head_dim": 16,
        "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
    }
    unet = UNet3DConditionModel(**(config | changes)).eval()
    # Nothing may be zero, or a wrong temporal layer would not be seen.
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return unet


@pytest.mark.parametrize(
    ("size", "changes"), [(ODD, {}), (EVEN, {"layers_per_block": 1, "attention_head_dim": 8})], ids=["deep", "flat"]
)
@torch.no_grad()
def test_equals_the_3d_unet_of_diffusers(size: tuple[int, int], changes: dict) -> None:
    unet3d = tiny_unet3d(**changes)
    serial = SerialUNet.from_unet3d(unet3d)
    batch = batch_for(unet3d, size=size)
    expected = batch.by(unet3d)
    torch.testing.assert_close(batch.by(serial), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1
    # The comparison sees every kind of temporal layer.
    for name in ("transformer_in", "down_blocks.0.temp_convs.0", "up_blocks.1.temp_attentions.0"):
        changed = copy.deepcopy(serial)
        changed.temporal.get_submodule(name).zero_output()
        assert not torch.allclose(batch.by(changed), expected, rtol=1e-4, atol=1e-5)


def test_weights_have_the_names_of_the_3d_unet_after_a_prefix() -> None:
    unet3d = tiny_unet3d()
    mine = {
        name.removeprefix("unet.").removeprefix("temporal."): tensor.shape
        for name, tensor in SerialUNet.from_unet3d(unet3d).state_dict().items()
    }
    assert mine == {name: tensor.shape for name, tensor in unet3d.state_dict().items()}


@torch.no_grad()
def test_parallel_model_is_not_the_3d_unet() -> None:
    unet3d = tiny_unet3d()
    serial = SerialUNet.from_unet3d(unet3d)
    parallel = ParallelUNet.from_unet2d(serial.unet)
    parallel.ring.load_state_dict(serial.temporal.state_dict(), strict=False)
    batch = batch_for(unet3d)
    assert not torch.allclose(batch.by(parallel), batch.by(unet3d), atol=1e-2)


def test_distilled_3d_unets_are_refused() -> None:
    with pytest.raises(MobiusError, match="time_cond_proj_dim"):
        SerialUNet.from_unet3d(tiny_unet3d(time_cond_proj_dim=8))


@each_kind_in_one_size
@torch.no_grad()
def test_new_model_equals_the_2d_model_per_frame(unet: UNet2DConditionModel, size: tuple[int, int]) -> None:
    batch = batch_for(unet, size=size)
    expected = batch.frames().by(unet).unflatten(0, (2, 3)).transpose(1, 2)
    assert torch.equal(batch.by(SerialUNet.from_unet2d(unet)), expected)
    assert not torch.allclose(batch.by(serial_with_random_temporal_layers(unet)), expected)


def test_after_two_steps_every_temporal_layer_learns(unet: UNet2DConditionModel) -> None:
    model: Any = build_denoiser(unet, "text-to-video", "serial")
    batch = batch_for(unet, frames=4)
    optimizer = torch.optim.AdamW(model.temporal.parameters(), lr=1e-3)
    for step in range(4):
        optimizer.zero_grad()
        batch.by(model).square().mean().backward()
        idle = {name for name, p in model.temporal.named_parameters() if not p.grad.any()}
        assert bool(idle) == (step == 0)
        optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.temporal.parameters())
    assert all(p.grad is None for p in model.unet.parameters())


@pytest.mark.parametrize("mode", ["serial", "full"])
def test_recomputing_changes_the_memory_and_not_the_numbers(mode: Mode) -> None:
    model: Any = build_denoiser(tiny_unet("sd1"), "text-to-video", mode)
    batch = batch_for(model.unet, size=(18, 10))
    held, gradients = [], []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        prediction, kept = result_and_held(lambda: model.predict(*batch.given()), model)
        held.append(kept)
        model.zero_grad()
        prediction.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert held[1] < 0.2 * held[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@two_kinds
def test_save_and_load(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    model = serial_with_random_temporal_layers(unet)
    model.save_pretrained(tmp_path)
    loaded = SerialUNet.from_pretrained(tmp_path)
    assert weights_hash(loaded) == weights_hash(model)
    batch = batch_for(unet)
    torch.testing.assert_close(batch.by(loaded), batch.by(model))
    with pytest.raises(MobiusError, match=r"SerialUNet.*ParallelUNet"):
        ParallelUNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bfloat16(autocast: bool) -> None:
    model = serial_with_random_temporal_layers(tiny_unet("emoji"))
    batch = batch_for(model.unet)
    exact = batch.by(model).detach()
    if not autocast:
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = batch.by(model)
    assert prediction.dtype == torch.bfloat16
    assert (prediction.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("mode", "same"), [("serial", True), ("full", False)])
def test_dropout_is_only_active_in_layers_that_are_trained(mode: Mode, same: bool) -> None:
    model: Any = build_denoiser(tiny_unet("emoji", dropout=0.5), "text-to-video", mode)
    assert isinstance(model, SerialUNet)
    batch = batch_for(model)
    for module in (model, model.train()):
        torch.manual_seed(0)
        first = batch.by(module)
        torch.manual_seed(1)
        assert torch.equal(batch.by(module), first) == same
    assert model.temporal.training
    assert model.unet.training != same
    assert not model.eval().unet.training
