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

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mobius_train.encoders.load_text_encoding import load_text_encoding
from mobius_train.encoders.text_encoding import components_of
from mobius_train.errors import MobiusError
from mobius_train.models import weights_hash
from mobius_train.models.composite import Composite
from mobius_train.models.families import as_denoiser, family_of, video_models
from mobius_train.pretrained.strict_load import load_diffusers

MOTION = "motion.safetensors"
KEY = "mobius_train"
SCHEDULERS: dict[str, Any] = {kind.__name__: kind for kind in (DDIMScheduler, FlowMatchEulerDiscreteScheduler)}
SETTINGS = ("max_text_tokens", "num_frames", "resolution", "guidance_scale", "frame_noise_correlation")


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


def write_motion(pipeline: Any, folder: Path, base: str, text_encoder: str | None = None) -> None:
    """Write the trained part of a TextToVideoPipeline's video model, in float16, and check that it loads.

    Args:
        folder: new, or without MOTION.
        base, text_encoder: see above.

    Raises:
        MobiusError: the model is no video model, all of its weights are trained, or the base is another image model.
    """
    model = pipeline.unet
    if not isinstance(model, Composite):
        raise MobiusError(f"a {type(model).__name__} has no motion weights: give a text-to-video pipeline")
    part = _trained_part(type(model))
    image = _image_model(type(model), _place(base, folder))
    digest = weights_hash(image)
    inside = getattr(model, model.image_part)
    if digest != weights_hash(inside.to(torch.float32)):
        raise MobiusError(
            f"the image model in {base} is not the one in this pipeline: give the base that it was trained from. A"
            " model of mode=full has trained all weights, so it has no motion weights of its own"
        )
    trained = getattr(model, part)
    scheduler = pipeline.scheduler
    description = Description(
        model=type(model).__name__,
        config=_plain(trained.config),
        base=base,
        base_sha256=digest,
        text_encoder=text_encoder,
        scheduler={"_class_name": type(scheduler).__name__, **_plain(scheduler.config)},
        settings={name: pipeline.config[name] for name in SETTINGS},
    )
    state = {
        name: tensor.detach().to("cpu", torch.float16 if tensor.is_floating_point() else None).contiguous()
        for name, tensor in trained.state_dict().items()
    }
    metadata = {"format": "pt", KEY: description.model_dump_json()}
    save_file(state, folder / MOTION, metadata)


def motion_parts(folder: Path) -> dict[str, Any]:
    """The arguments of TextToVideoPipeline for motion weights and what they refer to, in float32.

    Raises:
        MobiusError: the file is damaged, or what it refers to is missing or another.
    """
    path = folder / MOTION
    description, state = _read(path)
    kind = video_models().get(description.model)
    scheduler = SCHEDULERS.get(str(description.scheduler.get("_class_name")))
    if kind is None or scheduler is None or set(description.settings) - set(SETTINGS):
        raise MobiusError(f"{path} has a model, a sampler or settings that this version does not know")
    base = _place(description.base, folder)
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
    model = constructor(**{kind.image_part: image, part: trained}).eval()
    wanted = as_denoiser(model).backbone.condition_widths
    source = str(base) if description.text_encoder is None else str(_place(description.text_encoder, folder))
    text = load_text_encoding(source, torch.device("cpu"), description.settings.get("max_text_tokens"), wanted)
    return {
        "vae": load_diffusers(AutoencoderKL, base, "vae"),
        **components_of(text),
        "unet": model,
        "scheduler": scheduler.from_config(description.scheduler),
        **description.settings,
    }


def _read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = (file.metadata() or {}).get(KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MobiusError(f"{path} cannot be read: {error}") from error
    if metadata is None:
        raise MobiusError(f"{path} has no metadata {KEY!r}, so it was not written by convert_checkpoint.py to-motion")
    try:
        return Description.model_validate_json(metadata), state
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
    model: nn.Module = load_diffusers(family.image_model, base, family.part, family.also_named)
    return model


def _place(name: str, folder: Path) -> Path | str:
    """A folder relative to the weights, or the name as it is."""
    if name.startswith("."):
        return (folder / name).resolve()
    return Path(name) if Path(name).is_dir() else name


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of diffusers without its own entries, as JSON keeps it."""
    plain: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
    return plain
