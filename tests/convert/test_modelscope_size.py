"""Every weight of a UNet3DConditionModel of ModelScope's size has its place in the ring or the spatial UNet."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet3DConditionModel

from mobius_train.convert.unet3d import to_unet3d
from mobius_train.models import ParallelUNet, SerialUNet

pytestmark = pytest.mark.slow


def test_all_names_map_there_and_back() -> None:
    with torch.device("meta"):
        # The configuration of damo-vilab/text-to-video-ms-1.7b: the defaults of the class.
        original = UNet3DConditionModel(sample_size=32)
        shapes = {name: tensor.shape for name, tensor in original.state_dict().items()}
        assert round(sum(shape.numel() for shape in shapes.values()) / 1e9, 2) == 1.41
        serial = SerialUNet.from_unet3d(original)
        parallel = ParallelUNet.from_unet2d(serial.unet)
        ring = {name: tensor.shape for name, tensor in parallel.ring.state_dict().items()}
        spatial = {name: tensor.shape for name, tensor in parallel.spatial.state_dict().items()}
        temporal = {name: tensor.shape for name, tensor in serial.temporal.state_dict().items()}
        assert temporal.items() <= ring.items()
        assert temporal | spatial == shapes
        assert not temporal.keys() & spatial.keys()
        back = to_unet3d(parallel.spatial, {name: parallel.ring.state_dict()[name] for name in temporal})
        assert {name: tensor.shape for name, tensor in back.state_dict().items()} == shapes
        assert {k: v for k, v in back.config.items() if k[0] != "_"} == {
            k: v for k, v in original.config.items() if k[0] != "_"
        }
