"""Saving and loading of models that consist of several diffusers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers import ConfigMixin, ModelMixin

from mobius_train.errors import MobiusError


class Composite(ModelMixin, ConfigMixin):
    """A model whose folder has its own config.json, and a subfolder in diffusers' layout for each part.

    The constructor takes the parts as keyword arguments.

    Attributes:
        parts: the class of each part, by its name.
        image_part: name of the text-to-image model's part.
    """

    parts: ClassVar[dict[str, type[ModelMixin]]]
    image_part: ClassVar[str]

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write config.json and the parts; options as for ModelMixin.save_pretrained."""
        folder = Path(save_directory)
        self.save_config(folder)
        for name in self.parts:
            getattr(self, name).save_pretrained(folder / name, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a model saved by `save_pretrained`; options such as torch_dtype as for ModelMixin.from_pretrained.

        Raises:
            MobiusError: the folder is missing or incomplete, or contains a model of another class.
        """
        folder = Path(pretrained_model_name_or_path, options.pop("subfolder", None) or "")
        if not (folder / cls.config_name).is_file():
            raise MobiusError(f"no {cls.__name__} in {folder}: there is no {cls.config_name}. Check the path")
        kind = cls.load_config(folder).get("_class_name")
        if kind != cls.__name__:
            raise MobiusError(f"{folder} contains a {kind}, not a {cls.__name__}: load it with {kind}.from_pretrained")
        parts = {}
        for name, part in cls.parts.items():
            try:
                parts[name] = part.from_pretrained(folder / name, **options)
            except OSError as error:
                raise MobiusError(
                    f"{folder} is incomplete: cannot load {name}/ ({error}). Save or copy it again"
                ) from error
        return cls(**parts)

    def register_backbone_config(self, config: dict[str, Any]) -> None:
        """Copy the image model's configuration into this model's: pipelines read in_channels and other entries."""
        self.register_to_config(**{name: value for name, value in config.items() if not name.startswith("_")})
