"""The interface between a backbone's folder and the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mobius_train.models.composite import Composite
from mobius_train.models.denoiser import Denoiser
from mobius_train.ring_shape import RingShape


@dataclass(frozen=True)
class Family:
    """A class of text-to-image models, and the video models built from it.

    Attributes:
        part: the model's subfolder in an image pipeline, in diffusers' layout.
        image_model: diffusers' class.
        image_denoiser: wraps the image model as a Denoiser of single frames.
        parallel: the class of the model with a ring.
        new_parallel: builds a parallel model with a new ring of the given shape; it contains the image model, not a
            copy. It refuses shapes that it does not support.
        serial: the class of the model with temporal layers inside; None if the family has no serial model.
        new_serial: builds a serial model with new temporal layers; it contains the image model, not a copy.
        also_named: further names that saved configurations give the class. Other models have them too, without this
            value of this field.
        drops_variance: the image model may predict a variance too; backbone and ring predict only the rest.
    """

    part: str
    image_model: type[nn.Module]
    image_denoiser: Callable[[Any], Denoiser]
    parallel: type[Composite]
    new_parallel: Callable[[Any, RingShape], Denoiser]
    serial: type[Composite] | None = None
    new_serial: Callable[[Any], Denoiser] | None = None
    also_named: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    drops_variance: bool = False

    @property
    def video_models(self) -> tuple[type[Composite], ...]:
        return (self.parallel,) if self.serial is None else (self.parallel, self.serial)
