"""Build the model that a run trains from a text-to-image model."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn

from mobius_train.errors import MobiusError
from mobius_train.models.composite import Composite
from mobius_train.models.denoiser import Denoiser
from mobius_train.models.families import family_of, is_video_model
from mobius_train.models.freezing import FULL, apply_freezing, new_parts


def build_denoiser(
    model: nn.Module,
    stage: Literal["text-to-image", "text-to-video"],
    mode: Literal["parallel", "serial", "full"],
    ring_width: float | None = None,
) -> Denoiser:
    """Build the model of a stage and mode, with only its trained parameters requiring gradients.

    Args:
        model: an image model, used without a copy; or a video model of this mode, whose training continues.
        stage: text-to-image trains the whole image model in every mode.
        mode: parallel trains the ring, serial the temporal layers, full all layers of a serial model.
        ring_width: of a new ring, 1 by default; a ring whose training continues must have it if it is given.

    Raises:
        MobiusError: the image model has unsupported conditions or blocks, or the video model has another mode or
            width.
    """
    family = family_of(type(model).__name__)
    trains_all = stage == "text-to-image" or mode == "full"
    made: Any
    if is_video_model(model):
        wanted = family.parallel if mode == "parallel" else family.serial
        if stage != "text-to-video" or type(model) is not wanted:
            raise MobiusError(
                f"the pretrained model is a {type(model).__name__}, which cannot be trained with stage={stage!r} and"
                f" mode={mode!r}: choose the model's own mode, or a text-to-image model"
            )
        made = model
        if mode == "parallel" and ring_width is not None and made.ring_width != ring_width:
            raise MobiusError(
                f"ring_width={ring_width:g}, but the pretrained model's ring has width {made.ring_width:g}: remove"
                " ring_width to continue its training, or start from the image model"
            )
    elif stage == "text-to-image":
        made = family.image_denoiser(model)
    elif mode == "parallel":
        made = family.new_parallel(model, 1.0 if ring_width is None else ring_width)
    elif family.new_serial is not None:
        made = family.new_serial(model)
    else:
        raise MobiusError(f"mode={mode}: {type(model).__name__} has no serial model, use mode=parallel")
    apply_freezing(made, FULL if trains_all else new_parts(cast(Composite, made)))
    return cast(Denoiser, made.train())
