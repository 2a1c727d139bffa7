"""The 2D UNet itself, as the first stage trains it."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from mobius_train.models.image_denoiser import ImageDenoiser
from mobius_train.models.unet.backbone import UNetBackbone


class ImageUNet(ImageDenoiser):
    """A 2D UNet that takes each frame of a clip for a picture of its own; see ImageDenoiser.

    Raises:
        MobiusError: the UNet needs conditions, or has blocks, that are not supported.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet, UNetBackbone(unet), [unet.conv_norm_out, unet.conv_act, unet.conv_out])
