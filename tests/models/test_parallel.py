"""Invariant 2: a new parallel model predicts on every frame what the 2D model predicts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from kinds import DTYPES, each_kind_in_one_size, two_kinds
from torch import Tensor
from unets import Batch, batch_for, serial_with_random_temporal_layers, tiny_unet

from mobius_train.errors import MobiusError
from mobius_train.models import ParallelUNet, Ring, SerialUNet, weights_hash


def picture_by_picture(unet: UNet2DConditionModel, batch: Batch) -> Tensor:
    """The 2D model on all frames as one batch of pictures, (B, C, F, H, W)."""
    prediction = batch.frames().by(unet)
    return prediction.unflatten(0, (len(batch.sample), -1)).transpose(1, 2)


@each_kind_in_one_size
@torch.no_grad()
def test_new_model_predicts_what_the_2d_model_predicts(unet: UNet2DConditionModel, size: tuple[int, int]) -> None:
    batch = batch_for(unet, size=size)
    expected = picture_by_picture(copy.deepcopy(unet), batch)
    model = ParallelUNet.from_unet2d(unet).train()
    assert torch.equal(batch.by(model), expected)
    # One picture at a time, as a clip of one frame and as the 2D model takes it.
    alone = batch.frames().at(0)
    one = Batch(alone.pictures.unsqueeze(2), alone.timestep, alone.conditions)
    assert torch.equal(one.by(model), picture_by_picture(unet, one))


@two_kinds
@torch.no_grad()
def test_serial_model_with_ordinary_temporal_layers_does_not(unet: UNet2DConditionModel) -> None:
    batch = batch_for(unet)
    expected = picture_by_picture(copy.deepcopy(unet), batch)
    assert not torch.allclose(batch.by(serial_with_random_temporal_layers(unet)), expected, atol=1e-2)


def test_call_and_output_are_those_of_the_3d_unet() -> None:
    model = ParallelUNet.from_unet2d(tiny_unet("emoji"))
    batch = batch_for(model.spatial)
    output = model(sample=batch.sample, timestep=7, encoder_hidden_states=batch.text)
    assert isinstance(output, UNet3DConditionOutput)
    assert output.sample.shape == batch.sample.shape
    assert torch.equal(model(batch.sample, torch.tensor(7), batch.text, return_dict=False)[0], output.sample)
    assert (model.config.in_channels, model.config.sample_size) == (4, 8)
    assert model.config.cross_attention_dim == 384
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")


def test_still_pictures_are_refused_with_the_remedy() -> None:
    model = ParallelUNet.from_unet2d(tiny_unet("emoji"))
    batch = batch_for(model.spatial)
    with pytest.raises(MobiusError, match=r"sample.unsqueeze\(2\)"):
        model(batch.sample[:, :, 0], batch.timestep, batch.text)


def test_spatial_is_the_given_unet_frozen_in_evaluation_mode() -> None:
    unet = tiny_unet("emoji", dropout=0.5).train()
    model = ParallelUNet.from_unet2d(unet).train()
    assert model.spatial is unet
    assert model.ring.training
    assert not any(module.training for module in unet.modules())
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert all(parameter.requires_grad for parameter in model.ring.parameters())


@two_kinds
def test_save_and_load(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    model = ParallelUNet.from_unet2d(unet)
    torch.nn.init.normal_(model.ring.fusion.weight)
    model.save_pretrained(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "config.json",
        "ring/config.json",
        "ring/diffusion_pytorch_model.safetensors",
        "spatial/config.json",
        "spatial/diffusion_pytorch_model.safetensors",
    ]
    loaded = ParallelUNet.from_pretrained(tmp_path)
    assert weights_hash(loaded) == weights_hash(model)
    assert dict(loaded.config).keys() >= {"in_channels", "cross_attention_dim"}
    batch = batch_for(unet)
    # The same weights at another alignment in memory: kernels may differ in the last bit.
    torch.testing.assert_close(batch.by(loaded), batch.by(model))
    assert weights_hash(UNet2DConditionModel.from_pretrained(tmp_path / "spatial")) == weights_hash(unet)
    assert ParallelUNet.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).ring.dtype == torch.bfloat16


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=r"missing.*config\.json"):
        ParallelUNet.from_pretrained(tmp_path / "missing")
    SerialUNet.from_unet2d(tiny_unet("emoji")).save_pretrained(tmp_path / "serial")
    with pytest.raises(MobiusError, match=r"SerialUNet.*ParallelUNet"):
        ParallelUNet.from_pretrained(tmp_path / "serial")
    ParallelUNet.from_unet2d(tiny_unet("emoji")).save_pretrained(tmp_path / "torn")
    (tmp_path / "torn/ring/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MobiusError, match=r"torn/ring\b.*no weights"):
        ParallelUNet.from_pretrained(tmp_path / "torn")


def test_another_backbones_ring_is_refused() -> None:
    ring = Ring.from_unet2d(tiny_unet("sd2"))
    with pytest.raises(MobiusError, match=r"ParallelUNet\.from_unet2d"):
        ParallelUNet(tiny_unet("emoji"), ring)


@DTYPES
def test_dtypes_of_the_branches_are_their_own(frozen: torch.dtype, trained: torch.dtype, autocast: bool) -> None:
    model = ParallelUNet.from_unet2d(tiny_unet("emoji"))
    torch.nn.init.normal_(model.ring.fusion.weight, std=0.1)
    batch = batch_for(model.spatial)
    exact = batch.by(model).detach()
    model.spatial.to(frozen)
    model.ring.to(trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = batch.by(model)
    assert prediction.dtype == (torch.bfloat16 if autocast else trained)
    assert (prediction.float() - exact).norm() < 0.05 * exact.norm()
    prediction.float().square().mean().backward()
    assert all(parameter.grad.dtype == trained for parameter in model.ring.parameters())


def test_with_trained_shares_the_spatial_branch() -> None:
    model = ParallelUNet.from_unet2d(tiny_unet("emoji"))
    other = copy.deepcopy(model.ring)
    torch.nn.init.normal_(other.fusion.weight)
    combined = model.with_trained(other)
    batch = batch_for(model.spatial)
    assert combined.spatial is model.spatial
    assert torch.equal(batch.by(combined), model.predict(*batch.given(), trained=other))
    assert not torch.equal(batch.by(combined), batch.by(model))
