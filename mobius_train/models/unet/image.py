"""The 2D UNet as trained in the text-to-image stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from mobius_train.conditions import TEXT, Conditions
from mobius_train.models.added_conditions import added_cond_kwargs
from mobius_train.models.backbone import Timestep
from mobius_train.models.image_denoiser import ImageDenoiser
from mobius_train.models.unet.backbone import UNetBackbone


class ImageUNet(ImageDenoiser):
    """A 2D UNet that processes every frame of a clip independently; see ImageDenoiser.

    Raises:
        MobiusError: the UNet has unsupported conditions or blocks.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet, UNetBackbone(unet), [unet.conv_norm_out, unet.conv_act, unet.conv_out])

    def call(self, model: Callable[..., Any], frames: Tensor, timestep: Timestep, conditions: Conditions) -> Tensor:
        """See ImageDenoiser."""
        added = added_cond_kwargs(conditions)
        return model(frames, timestep, conditions[TEXT], added_cond_kwargs=added, return_dict=False)[0]
