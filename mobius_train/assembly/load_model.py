"""Load one part of a diffusers pipeline folder, or create it from a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import nn

from mobius_train.errors import MobiusError
from mobius_train.models.families import DEFAULT, family_of, parts, video_models
from mobius_train.pretrained.model_files import class_name, read_json
from mobius_train.pretrained.pipeline_index import named_parts
from mobius_train.pretrained.strict_load import CONFIG, find_model, load_diffusers, load_object

Part = TypeVar("Part")


def load_image_or_video_model(new_config: dict[str, Any] | None, name_or_path: str | None) -> nn.Module:
    """Load a run's initial model in float32: an image model, or the video model of one of this project's pipelines.

    Args:
        new_config: configuration of a new image model; `_class_name` defaults to UNet2DConditionModel.

    Raises:
        MobiusError: see `load_part`; or the model's family is not supported.
    """
    if new_config is not None:
        family = family_of(new_config["_class_name"]) if "_class_name" in new_config else DEFAULT
        return load_part(family.image_model, DEFAULT.part, new_config, None)
    if name_or_path is None:
        return load_part(DEFAULT.image_model, DEFAULT.part, None, None)
    named = named_parts(name_or_path)
    part = next((part for part in parts() if part in named), DEFAULT.part)
    folder = find_model(name_or_path, part).folder
    values = read_json(folder / CONFIG)
    # Old UNets are saved without the name of their class.
    kind = values.get("_class_name", DEFAULT.image_model.__name__) if part == DEFAULT.part else class_name(folder)
    if kind in video_models():
        return video_models()[kind].from_pretrained(folder)
    family = family_of(kind, values)
    return load_part(family.image_model, part, None, name_or_path, tuple(family.also_named))


def load_part(
    kind: type[Part],
    subfolder: str,
    new_config: dict[str, Any] | None,
    name_or_path: str | None,
    also_named: Sequence[str] = (),
) -> Part:
    """Load or create a diffusers model or scheduler.

    With `new_config` it is new. Otherwise it is loaded from the subfolder of `name_or_path` if there is one (a
    pipeline), else from the folder itself.

    Args:
        also_named: further names that the configuration may give a model's class.

    Raises:
        MobiusError: see `load_diffusers`.
    """
    loader: Any = kind
    if new_config is not None:
        try:
            return loader.from_config(new_config)
        except Exception as error:  # wrong values raise all kinds of errors
            raise MobiusError(f"{subfolder}_config is not a configuration of {kind.__name__}: {error}") from error
    if name_or_path is None:
        raise MobiusError(f"no {subfolder}: set pretrained_model_name_or_path, or {subfolder}_config for a new one")
    if issubclass(kind, nn.Module):
        return cast(Part, load_diffusers(kind, name_or_path, subfolder, also_named))
    return cast(Part, load_object(kind, find_model(name_or_path, subfolder, loader.config_name)))
