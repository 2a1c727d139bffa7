"""The trained motion of a video model alone, in one safetensors file beside a reference to its image model.

A pipeline folder repeats the frozen image model, the autoencoder and the text encoders. Motion weights name them, so a
model of a few megabytes can be handed on. The file's metadata has, as JSON under the key `mobius_train`:

    model           the class of the video model, such as ParallelUNet
    config          the configuration of its trained part
    base            the pipeline folder or hub name with the image model and the autoencoder; a path that begins with a
                    dot is relative to the file's folder
    base_sha256     `weights_hash` of the image model, in float32
    text_encoder    folder, hub name or package:NAME with the text encoders; null: the base
    scheduler       class and configuration of the sampler
    settings        of TextToVideoPipeline
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mobius_train.errors import MobiusError
from mobius_train.models.composite import Composite
from mobius_train.models.families import family_of, video_models
from mobius_train.models.hashing import weights_hash
from mobius_train.models.plain_config import plain_config
from mobius_train.pretrained.strict_load import load_diffusers

MOTION = "motion.safetensors"
KEY = "mobius_train"


class Description(BaseModel):
    """The metadata; see above."""

    model_config = ConfigDict(extra="forbid")

    model: str
    config: dict[str, Any]
    base: str
    base_sha256: str
    text_encoder: str | None
    scheduler: dict[str, Any]
    settings: dict[str, Any]


def write_motion(
    model: nn.Module, folder: Path, base: str, text_encoder: str | None, scheduler: Any, settings: Mapping[str, Any]
) -> None:
    """Write the trained part of a video model, in float16.

    Args:
        model: in float32.
        base, text_encoder, settings: see above.
        scheduler: the sampler.

    Raises:
        MobiusError: the model is no video model, all of its weights are trained, or the base is another image model.
    """
    if not isinstance(model, Composite):
        raise MobiusError(f"a {type(model).__name__} has no motion weights: give a text-to-video pipeline")
    digest = weights_hash(_image_model(type(model), place_of(base, folder)))
    if digest != weights_hash(model.get_submodule(model.image_part)):
        raise MobiusError(
            f"the image model in {base} is not the one in this pipeline: give the base that it was trained from. A"
            " model of mode=full has trained all weights, so it has no motion weights of its own"
        )
    trained: Any = model.get_submodule(_trained_part(type(model)))
    description = Description(
        model=type(model).__name__,
        config=plain_config(trained.config),
        base=base,
        base_sha256=digest,
        text_encoder=text_encoder,
        scheduler={"_class_name": type(scheduler).__name__, **plain_config(scheduler.config)},
        settings=dict(settings),
    )
    state = {
        name: tensor.detach().to("cpu", torch.float16 if tensor.is_floating_point() else None).contiguous()
        for name, tensor in trained.state_dict().items()
    }
    metadata = {"format": "pt", KEY: description.model_dump_json()}
    save_file(state, folder / MOTION, metadata)


def read_motion(folder: Path) -> tuple[nn.Module, Description]:
    """The video model of motion weights, in float32, and the other contents of the file.

    Raises:
        MobiusError: the file is damaged, or its base is missing or another.
    """
    path = folder / MOTION
    description, state = read_description(path), load_file(path)
    kind = video_models().get(description.model)
    if kind is None:
        raise MobiusError(f"{path} has a model that this version does not know: {description.model!r}")
    base = place_of(description.base, folder)
    image = _image_model(kind, base)
    if weights_hash(image) != description.base_sha256:
        raise MobiusError(
            f"{path} belongs to another image model than the one in {base}: restore that one, or give its place as"
            " `base` in the file's metadata"
        )
    part = _trained_part(kind)
    try:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in _made(kind, part, description).state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != shapes:
            odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            raise MobiusError(f"{path} and its configuration differ in {len(odd)} weight(s), such as {odd[0]}")
        trained = _made(kind, part, description)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MobiusError(f"{path}: its configuration cannot be built: {error}") from error
    trained.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    constructor: Any = kind
    model: nn.Module = constructor(**{kind.image_part: image, part: trained})
    return model.eval(), description


def place_of(name: str, folder: Path) -> Path | str:
    """The place of a base: a folder relative to the weights' folder, or the name as it is."""
    if name.startswith("."):
        return (folder / name).resolve()
    return Path(name) if Path(name).is_dir() else name


def read_description(path: Path) -> Description:
    """The metadata of a file of motion weights. No tensor is loaded.

    Raises:
        MobiusError: the file or its metadata is damaged, or it has none.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise MobiusError(f"{path} cannot be read: {error}") from error
    if metadata is None:
        raise MobiusError(f"{path} has no metadata {KEY!r}, so it was not written by convert_checkpoint.py to-motion")
    try:
        return Description.model_validate_json(metadata)
    except ValidationError as error:
        raise MobiusError(f"{path}: its metadata {KEY!r} is damaged: {error}") from error


def _made(kind: type[Composite], part: str, description: Description) -> nn.Module:
    made: Any = kind.parts[part]
    return made(**description.config)


def _trained_part(kind: type[Composite]) -> str:
    (part,) = (name for name in kind.parts if name != kind.image_part)
    return part


def _image_model(kind: type[Composite], base: Path | str) -> nn.Module:
    family = family_of(kind.__name__)
    model: nn.Module = load_diffusers(family.image_model, base, family.part, tuple(family.also_named))
    return model
