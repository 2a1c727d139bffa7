"""Build the model that a run trains from a text-to-image model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import nn

from mobius_train.errors import MobiusError
from mobius_train.models.composite import Composite
from mobius_train.models.denoiser import Denoiser
from mobius_train.models.families import family_of, is_video_model
from mobius_train.models.freezing import FULL, apply_freezing, new_parts
from mobius_train.ring_shape import RingShape


def build_denoiser(
    model: nn.Module,
    stage: Literal["text-to-image", "text-to-video"],
    mode: Literal["parallel", "serial", "full"],
    ring: Mapping[str, Any] | None = None,
) -> Denoiser:
    """Build the model of a stage and mode, with only its trained parameters requiring gradients.

    Args:
        model: an image model, used without a copy; or a video model of this mode, whose training continues.
        stage: text-to-image trains the whole image model in every mode.
        mode: parallel trains the ring, serial the temporal layers, full all layers of a serial model.
        ring: fields of RingShape for a new ring. A ring whose training continues must have these values. Modes without
            a ring ignore them.

    Raises:
        MobiusError: the image model has unsupported conditions or blocks, or the video model has another mode or
            shape.
    """
    ring = {} if ring is None else ring
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
        if mode == "parallel" and (found := made.ring_shape.different(ring)):
            fields = ", ".join(f"{name}={ring[name]} (the model has {value})" for name, value in found.items())
            raise MobiusError(
                f"the pretrained model's ring has another shape than the recipe: {fields}. Remove"
                f" {' and '.join(found)} to continue its training, or start from the image model"
            )
    elif stage == "text-to-image":
        made = family.image_denoiser(model)
    elif mode == "parallel":
        made = family.new_parallel(model, RingShape(**ring))
    elif family.new_serial is not None:
        made = family.new_serial(model)
    else:
        raise MobiusError(f"mode={mode}: {type(model).__name__} has no serial model, use mode=parallel")
    apply_freezing(made, FULL if trains_all else new_parts(cast(Composite, made)))
    return cast(Denoiser, made.train())
