"""Load one part of a diffusers pipeline folder, or create it from a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mobius_train.encoders.model_names import check_local
from mobius_train.errors import MobiusError
from mobius_train.models.families import DEFAULT, family_of, parts, video_models

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
        return load_part(family.image_model, family.part, new_config, None)
    for part in parts():
        folder = Path(name_or_path or "") / part
        if name_or_path is not None and (folder / "config.json").is_file():
            kind = _class_in(folder)
            if kind in video_models():
                made: Any = video_models()[kind]
                return made.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
            return load_part(family_of(kind).image_model, part, None, name_or_path)
    return load_part(DEFAULT.image_model, DEFAULT.part, None, name_or_path)


def _class_in(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MobiusError(f"cannot read the model's _class_name from {folder / 'config.json'}: {error!r}") from error


def load_part(kind: type[Part], subfolder: str, new_config: dict[str, Any] | None, name_or_path: str | None) -> Part:
    """Load or create a diffusers model or scheduler.

    With `new_config` it is new. Otherwise it is loaded from the subfolder of `name_or_path` if there is one (a
    pipeline), else from the folder itself.

    Raises:
        MobiusError: the folder does not exist, or does not contain this part.
    """
    loader: Any = kind
    if new_config is not None:
        try:
            return loader.from_config(new_config)
        except (TypeError, ValueError) as error:
            raise MobiusError(f"{subfolder}_config is not a configuration of {kind.__name__}: {error}") from error
    if name_or_path is None:
        raise MobiusError(f"no {subfolder}: set pretrained_model_name_or_path, or {subfolder}_config for a new one")
    check_local(name_or_path)
    # Master weights are float32 whatever dtype the files have; schedulers have no dtype.
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False} if issubclass(kind, torch.nn.Module) else {}
    try:
        return loader.from_pretrained(name_or_path, subfolder=subfolder, **options)
    except (OSError, ValueError) as in_subfolder:
        try:
            return loader.from_pretrained(name_or_path, **options)
        except (OSError, ValueError):
            reason = str(in_subfolder).strip().splitlines()[0]
            raise MobiusError(
                f"cannot load the {subfolder} ({kind.__name__}) from {name_or_path!r}: {reason}"
                f" Give a folder or hub name in diffusers layout that contains {subfolder}/."
            ) from in_subfolder
