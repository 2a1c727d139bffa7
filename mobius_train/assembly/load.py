"""Loading one part of a diffusers pipeline folder, or making a new one from a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel

from mobius_train.encoders.model_names import check_local
from mobius_train.errors import MobiusError
from mobius_train.models import ParallelUNet, SerialUNet

Part = TypeVar("Part")
VIDEO_MODELS: dict[str, type[ParallelUNet] | type[SerialUNet]] = {
    kind.__name__: kind for kind in (ParallelUNet, SerialUNet)
}


def load_unet(
    new_config: dict[str, Any] | None, name_or_path: str | None
) -> UNet2DConditionModel | ParallelUNet | SerialUNet:
    """The UNet that a run starts from: a 2D one, or the text-to-video model of a pipeline folder of ours.

    Raises:
        MobiusError: see `load_part`.
    """
    folder = Path(name_or_path or "") / "unet"
    if new_config is None and name_or_path is not None and (folder / "config.json").is_file():
        try:
            kind = VIDEO_MODELS.get(json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise MobiusError(f"{folder / 'config.json'} does not say what model this is: {error!r}") from error
        if kind is not None:
            return kind.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    return load_part(UNet2DConditionModel, "unet", new_config, name_or_path)


def load_part(kind: type[Part], subfolder: str, new_config: dict[str, Any] | None, name_or_path: str | None) -> Part:
    """A model or scheduler of diffusers.

    A new one when `new_config` is given; else from `name_or_path`: its subfolder where it has one (a
    pipeline), or the folder itself.

    Raises:
        MobiusError: there is no such folder, or what lies there is something else.
    """
    loader: Any = kind
    if new_config is not None:
        try:
            return loader.from_config(new_config)
        except (TypeError, ValueError) as error:
            raise MobiusError(f"{subfolder}_config is no configuration of {kind.__name__}: {error}") from error
    if name_or_path is None:
        raise MobiusError(f"no {subfolder}: set pretrained_model_name_or_path, or {subfolder}_config for a new one")
    check_local(name_or_path)
    # Masters are float32 whatever the files hold; schedulers have no dtype.
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
                f" It must be a folder or hub name in diffusers layout with a {subfolder}/ inside."
            ) from in_subfolder
