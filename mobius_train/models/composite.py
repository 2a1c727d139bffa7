"""Saving and loading of models that consist of several diffusers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers import ConfigMixin, ModelMixin

from mobius_train.errors import MobiusError
from mobius_train.pretrained.model_files import class_name
from mobius_train.pretrained.strict_load import load_diffusers


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
            MobiusError: the folder contains a model of another class, or see `load_diffusers`.
        """
        folder = Path(pretrained_model_name_or_path, options.pop("subfolder", None) or "")
        kind = class_name(folder)
        if kind != cls.__name__:
            raise MobiusError(f"{folder} contains a {kind}, not a {cls.__name__}: load it with {kind}.from_pretrained")
        return cls(**{name: load_diffusers(part, folder / name, **options) for name, part in cls.parts.items()})

    def register_backbone_config(self, config: dict[str, Any]) -> None:
        """Copy the image model's configuration into this model's: pipelines read in_channels and other entries."""
        self.register_to_config(**{name: value for name, value in config.items() if not name.startswith("_")})
