"""The configurations of a recipe's models, without their weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from mobius_train.assembly.known_models import KNOWN
from mobius_train.config import RunConfig
from mobius_train.encoders.load_text_encoding import choose_text_parts
from mobius_train.encoders.text_encoder import PART
from mobius_train.errors import MobiusError
from mobius_train.files import read_small
from mobius_train.models.families import DEFAULT, parts, video_models
from mobius_train.pretrained.model_files import read_json
from mobius_train.pretrained.model_names import local_folder, resolve_package
from mobius_train.pretrained.pipeline_index import named_parts
from mobius_train.run_files import FINAL
from mobius_train.yaml_files import parse_yaml

# The fields of a recipe that `find_configs` reads.
FIELDS = {
    "stage",
    "pretrained_model_name_or_path",
    "vae_name_or_path",
    "text_encoder_name_or_path",
    "use_t5",
    "unet_config",
    "vae_config",
    "scheduler_config",
}


@dataclass(frozen=True)
class ModelConfigs:
    """The configurations of a recipe's models; None and {} for models that its stage does not use.

    Attributes:
        text_encoders: by part.
        scheduler: None if it is not known.
        ring: of a video model in a local folder, whose training continues; None: the recipe makes a new ring, if any.
        sources: the origin of each configuration, by part.
    """

    image_model: dict[str, Any] | None
    vae: dict[str, Any]
    text_encoders: dict[str, dict[str, Any]]
    scheduler: dict[str, Any] | None
    sources: dict[str, str]
    ring: dict[str, Any] | None = None


def find_configs(config: RunConfig, recipe: Path | None = None) -> ModelConfigs:
    """Find the config.json of every model in local folders, the hub's cache, or the well-known models.

    Args:
        recipe: the recipe's file. If a model folder is the output of another recipe in the same folder, that recipe
            provides the configuration.

    Raises:
        MobiusError: a model's configuration was not found.
    """
    sources: dict[str, str] = {}

    def part(name: str, key: str, source: str | None, given: dict[str, Any] | None = None) -> dict[str, Any]:
        found, sources[name] = (given, "the recipe") if given is not None else _find(name, key, source, recipe)
        return found

    pretrained = config.pretrained_model_name_or_path
    if config.stage == "autoencoder":
        vae = part("vae", "pretrained_model_name_or_path", pretrained, config.vae_config)
        return ModelConfigs(None, vae, {}, None, sources)
    text = config.text_encoder_name_or_path or pretrained
    image_model = part("unet", "pretrained_model_name_or_path", pretrained, config.unet_config)
    return ModelConfigs(
        image_model,
        part("vae", "vae_name_or_path", config.vae_name_or_path or pretrained),
        {name: part(name, "text_encoder_name_or_path", text) for name in _text_parts(text, config.use_t5)},
        config.scheduler_config or _find_scheduler(pretrained, recipe),
        sources,
        _ring_beside(Path(sources["unet"])),
    )


def _ring_beside(image_config: Path) -> dict[str, Any] | None:
    """The configuration of the ring in the folder of a video model, of which this is its image model's."""
    of_model, of_ring = (image_config.parent.parent / name for name in ("config.json", "ring/config.json"))
    if not (of_model.is_file() and of_ring.is_file()):
        return None
    return read_json(of_ring) if read_json(of_model).get("_class_name") in video_models() else None


def _find_scheduler(source: str | None, recipe: Path | None) -> dict[str, Any] | None:
    """The scheduler's configuration of a model; not every source that has the other configurations has it."""
    if source is None:
        return None
    folder = local_folder(resolve_package(source))
    path = (folder or Path()) / "scheduler" / DDPMScheduler.config_name
    if folder is not None and path.is_file():
        return read_json(path)
    found = _in_sibling(source, "scheduler", recipe)
    return _known(source).get("scheduler") if found is None else found[0]


def _text_parts(source: str | None, use_t5: bool | None) -> list[str]:
    """As `text_parts`, also for the well-known models."""
    if source is None:
        return [PART]
    folder = local_folder(resolve_package(source))
    return choose_text_parts(list(_known(source)) if folder is None else named_parts(str(folder)), source, use_t5)


def _known(source: str) -> dict[str, dict[str, Any]]:
    return KNOWN.get(source.rsplit("/", 1)[-1], {})


def _find(part: str, key: str, source: str | None, recipe: Path | None) -> tuple[dict[str, Any], str]:
    if source is None:
        raise MobiusError(f"no {part}: set {key}")
    source = resolve_package(source)
    folders = parts() if part == DEFAULT.part else (part,)
    local = (_in_folder(Path(source), folder) for folder in folders)
    cached = (_in_cache(source, folder) for folder in folders)
    found = next(filter(None, itertools.chain(local, cached)), None)
    if found is None:
        found = _in_sibling(source, part, recipe)
    if found is None:
        known = next((_known(source)[folder] for folder in folders if folder in _known(source)), None)
        found = None if known is None else (known, f"the built-in configuration of {source}")
    if found is None:
        names = ", ".join(name for name, known in KNOWN.items() if not known.keys().isdisjoint(folders))
        raise MobiusError(
            f"cannot find the configuration of the {part} {source!r}: it is not a local folder with a config.json, not"
            f" in the hub's cache, and not one of the known models ({names}). Give one of these in {key}"
            + (", or unet_config" if part == "unet" else "")
        )
    return found


def _in_folder(folder: Path, part: str) -> tuple[dict[str, Any], str] | None:
    for path in (folder / part / "config.json", folder / "config.json"):
        if path.is_file():
            config = read_json(path)
            video_model = video_models().get(config.get("_class_name", ""))
            return (
                (config, str(path)) if video_model is None else _in_folder(path.parent / video_model.image_part, part)
            )
    return None


def _in_cache(name: str, part: str) -> tuple[dict[str, Any], str] | None:
    for file in (f"{part}/config.json", "config.json"):
        try:
            path = try_to_load_from_cache(name, file)
        except HFValidationError:
            return None
        if isinstance(path, str):
            return read_json(Path(path)), path
    return None


def _in_sibling(source: str, part: str, recipe: Path | None) -> tuple[dict[str, Any], str] | None:
    """The `unet_config`, `vae_config` or `scheduler_config` of the recipe whose run writes this folder."""
    for path in sorted(recipe.parent.glob("*.yaml")) if recipe is not None else ():
        try:
            values = parse_yaml(read_small(path).decode("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and values.get(f"{part}_config") and "output_dir" in values:
            folder = Path(str(values["output_dir"]))
            if Path(source) in (folder, folder / FINAL):
                return values[f"{part}_config"], str(path)
    return None
