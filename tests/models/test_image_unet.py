from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from unets import batch_for, tiny_unet

from mobius_train.errors import MobiusError
from mobius_train.models import ImageUNet


@torch.no_grad()
def test_each_frame_is_a_picture_of_its_own(unet: UNet2DConditionModel) -> None:
    batch = batch_for(unet)
    prediction = batch.by(ImageUNet(unet))
    for clip in range(2):
        for frame in range(3):
            alone = batch.frames().at(3 * clip + frame).by(unet)[0]
            torch.testing.assert_close(prediction[clip, :, frame], alone, rtol=1e-4, atol=1e-5)


def test_it_trains_the_unet_itself() -> None:
    unet = tiny_unet("emoji")
    model = ImageUNet(unet)
    assert model.trained is unet
    assert model.with_trained(unet) is unet
    assert model.frozen is None
    assert model.dtype == torch.float32
    assert model.config.in_channels == 4
    batch = batch_for(unet)
    model(batch.sample, batch.timestep, batch.text, return_dict=False)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_pictures_without_a_frame_axis_are_refused() -> None:
    unet = tiny_unet("emoji")
    batch = batch_for(unet)
    with pytest.raises(MobiusError, match="unsqueeze"):
        ImageUNet(unet)(batch.sample[:, :, 0], batch.timestep, batch.text)
