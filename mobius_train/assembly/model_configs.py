"""The configurations of a recipe's models, without their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from mobius_train.assembly.known_models import KNOWN
from mobius_train.config import RunConfig
from mobius_train.errors import MobiusError
from mobius_train.files import read_small
from mobius_train.models.families import DEFAULT, parts, video_models
from mobius_train.pretrained.model_files import read_json
from mobius_train.pretrained.model_names import resolve_package
from mobius_train.yaml_files import parse_yaml


@dataclass(frozen=True)
class ModelConfigs:
    """The configurations of a recipe's models; None for models that its stage does not use.

    Attributes:
        sources: the origin of each configuration, by part.
    """

    image_model: dict[str, Any] | None
    vae: dict[str, Any]
    text_encoder: dict[str, Any] | None
    sources: dict[str, str]


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
        return ModelConfigs(None, vae, None, sources)
    return ModelConfigs(
        part("unet", "pretrained_model_name_or_path", pretrained, config.unet_config),
        part("vae", "vae_name_or_path", config.vae_name_or_path or pretrained),
        part("text_encoder", "text_encoder_name_or_path", config.text_encoder_name_or_path or pretrained),
        sources,
    )


def _find(part: str, key: str, source: str | None, recipe: Path | None) -> tuple[dict[str, Any], str]:
    if source is None:
        raise MobiusError(f"no {part}: set {key}")
    source = resolve_package(source)
    folders = parts() if part == DEFAULT.part else (part,)
    local = (_in_folder(Path(source), folder) for folder in folders)
    found = next(filter(None, local), None) or _in_cache(source, part)
    if found is None:
        found = _in_sibling(source, part, recipe)
    if found is None:
        known = KNOWN.get(source.rsplit("/", 1)[-1], {}).get(part)
        found = None if known is None else (known, f"the built-in configuration of {source}")
    if found is None:
        names = ", ".join(name for name, parts in KNOWN.items() if part in parts)
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
    """The `unet_config` or `vae_config` of the recipe whose run writes this folder."""
    for path in sorted(recipe.parent.glob("*.yaml")) if recipe is not None else ():
        try:
            values = parse_yaml(read_small(path).decode("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and values.get(f"{part}_config") and "output_dir" in values:
            folder = Path(str(values["output_dir"]))
            if Path(source) in (folder, folder / "final"):
                return values[f"{part}_config"], str(path)
    return None
