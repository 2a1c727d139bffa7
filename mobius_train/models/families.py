"""The supported families of text-to-image models. A new backbone adds one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from mobius_train.errors import MobiusError
from mobius_train.models.composite import Composite
from mobius_train.models.denoiser import Denoiser
from mobius_train.models.family import Family
from mobius_train.models.pixart.family import PIXART
from mobius_train.models.sd3.family import SD3
from mobius_train.models.unet.family import UNET

FAMILIES: tuple[Family, ...] = (UNET, SD3, PIXART)
# The family of a new model whose configuration in the recipe has no `_class_name`.
DEFAULT = UNET


def family_of(class_name: str, config: Mapping[str, Any] | None = None) -> Family:
    """The family of an image model or video model, by class name.

    Args:
        config: its saved configuration, for a name that several kinds of models have.

    Raises:
        MobiusError: there is no such family.
    """
    described = class_name
    for family in FAMILIES:
        if class_name in [kind.__name__ for kind in (family.image_model, *family.video_models)]:
            return family
        if class_name in family.also_named:
            field, value = family.also_named[class_name]
            if config is None or config.get(field) == value:
                return family
            described = f"{class_name} with {field}={config.get(field)}"
    known = ", ".join(family.image_model.__name__ for family in FAMILIES)
    remedy = ". Convert it with tools/convert_checkpoint.py serial-to-parallel" if "UNet3D" in class_name else ""
    raise MobiusError(f"a {described} cannot be a backbone: the supported text-to-image models are {known}{remedy}")


def parts() -> tuple[str, ...]:
    """Subfolders of a pipeline that may contain its denoiser; this project's pipelines always name it unet."""
    return tuple(dict.fromkeys((DEFAULT.part, *(family.part for family in FAMILIES))))


def video_models() -> dict[str, type[Composite]]:
    """The classes of all video models, by name."""
    return {kind.__name__: kind for family in FAMILIES for kind in family.video_models}


def is_video_model(model: Any) -> bool:
    return isinstance(model, Composite)


def as_denoiser(model: nn.Module) -> Denoiser:
    """The video model itself, or an image model wrapped as a Denoiser of independent frames."""
    if is_video_model(model):
        return cast(Denoiser, model)
    return family_of(type(model).__name__).image_denoiser(model)
