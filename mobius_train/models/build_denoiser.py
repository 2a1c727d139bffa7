"""From a 2D UNet to the model that a run trains."""

from __future__ import annotations

from typing import Literal

from diffusers import UNet2DConditionModel

from mobius_train.errors import MobiusError
from mobius_train.models.backbone import check_backbone
from mobius_train.models.denoiser import Denoiser
from mobius_train.models.freezing import FULL, PARALLEL, SERIAL, apply_freezing
from mobius_train.models.image import ImageUNet
from mobius_train.models.parallel import ParallelUNet
from mobius_train.models.serial import SerialUNet


def build_denoiser(
    unet: UNet2DConditionModel | ParallelUNet | SerialUNet,
    stage: Literal["text-to-image", "text-to-video"],
    mode: Literal["parallel", "serial", "full"],
    gradient_checkpointing: bool,
) -> Denoiser:
    """The model of a stage and mode, with what it trains thawed and the rest frozen.

    Args:
        unet: a 2D UNet, which becomes a part of the model, not a copy; or a model of this mode, which goes on.
        stage: text-to-image trains the whole 2D UNet, whatever the mode.
        mode: parallel trains the ring, serial the temporal layers, full all layers of a serial model.
        gradient_checkpointing: recompute the trained layers in the backward pass instead of keeping them.

    Raises:
        MobiusError: the UNet wants conditions, or has blocks, that are not supported, or the model is of another
            mode.
    """
    if isinstance(unet, ParallelUNet | SerialUNet):
        return _go_on(unet, stage, mode, gradient_checkpointing)
    check_backbone(unet)
    if stage == "text-to-image":
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        image = ImageUNet(unet).train()
        apply_freezing(image, FULL)
        return image
    if mode == "parallel":
        parallel = ParallelUNet.from_unet2d(unet, gradient_checkpointing).train()
        apply_freezing(parallel, PARALLEL)
        return parallel
    serial = SerialUNet.from_unet2d(unet, gradient_checkpointing).train()
    apply_freezing(serial, SERIAL if mode == "serial" else FULL)
    return serial


def _go_on(model: ParallelUNet | SerialUNet, stage: str, mode: str, gradient_checkpointing: bool) -> Denoiser:
    if stage != "text-to-video" or isinstance(model, ParallelUNet) != (mode == "parallel"):
        raise MobiusError(
            f"the pretrained model is a {type(model).__name__}, which stage {stage!r} with mode {mode!r} cannot go on"
            " with: choose the mode that it was made for, or a text-to-image model"
        )
    if isinstance(model, ParallelUNet):
        model.ring.gradient_checkpointing = gradient_checkpointing
        apply_freezing(model, PARALLEL)
    else:
        model.gradient_checkpointing = gradient_checkpointing
        apply_freezing(model, SERIAL if mode == "serial" else FULL)
    return model.train()
