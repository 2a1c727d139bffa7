"""The 2D UNet as trained in the text-to-image stage."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from mobius_train.models.image_denoiser import ImageDenoiser
from mobius_train.models.unet.backbone import UNetBackbone


class ImageUNet(ImageDenoiser):
    """A 2D UNet that processes every frame of a clip independently; see ImageDenoiser.

    Raises:
        MobiusError: the UNet has unsupported conditions or blocks.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet, UNetBackbone(unet), [unet.conv_norm_out, unet.conv_act, unet.conv_out])
