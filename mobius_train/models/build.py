"""From a 2D UNet to the model that a run trains."""

from __future__ import annotations

from typing import Literal

from diffusers import UNet2DConditionModel

from mobius_train.models.backbone import check_backbone
from mobius_train.models.denoiser import Denoiser
from mobius_train.models.freezing import FULL, PARALLEL, SERIAL, apply_freezing
from mobius_train.models.image import ImageUNet
from mobius_train.models.parallel import ParallelUNet
from mobius_train.models.serial import SerialUNet


def build_denoiser(
    unet2d: UNet2DConditionModel,
    stage: Literal["text-to-image", "text-to-video"],
    mode: Literal["parallel", "serial", "full"],
    gradient_checkpointing: bool,
) -> Denoiser:
    """The model of a stage and mode, with what it trains thawed and the rest frozen.

    Args:
        unet2d: becomes a part of the model, not a copy.
        stage: text-to-image trains the whole 2D UNet, whatever the mode.
        mode: parallel trains the ring, serial the temporal layers, full all layers of a serial model.
        gradient_checkpointing: recompute the trained layers in the backward pass instead of keeping them.

    Raises:
        MobiusError: the UNet wants conditions, or has blocks, that are not supported.
    """
    check_backbone(unet2d)
    if stage == "text-to-image":
        if gradient_checkpointing:
            unet2d.enable_gradient_checkpointing()
        image = ImageUNet(unet2d).train()
        apply_freezing(image, FULL)
        return image
    if mode == "parallel":
        parallel = ParallelUNet.from_unet2d(unet2d, gradient_checkpointing).train()
        apply_freezing(parallel, PARALLEL)
        return parallel
    serial = SerialUNet.from_unet2d(unet2d, gradient_checkpointing).train()
    apply_freezing(serial, SERIAL if mode == "serial" else FULL)
    return serial
