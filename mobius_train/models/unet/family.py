"""The UNet of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from mobius_train.models.family import Family
from mobius_train.models.parallel import ParallelUNet
from mobius_train.models.serial import SerialUNet
from mobius_train.models.unet.image import ImageUNet
from mobius_train.ring_shape import UNET_FIELDS

UNET = Family(
    part="unet",
    image_model=UNet2DConditionModel,
    image_denoiser=ImageUNet,
    parallel=ParallelUNet,
    new_parallel=lambda unet, shape: ParallelUNet.from_unet2d(unet, **shape.taken_by("UNet", UNET_FIELDS)),
    serial=SerialUNet,
    new_serial=SerialUNet.from_unet2d,
)
