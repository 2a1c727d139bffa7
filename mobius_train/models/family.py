"""What a backbone's folder gives to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mobius_train.models.composite import Composite
from mobius_train.models.denoiser import Denoiser


@dataclass(frozen=True)
class Family:
    """A kind of text-to-image model, and the models that can be made from it.

    Attributes:
        part: the subfolder of an image pipeline that holds the model, in diffusers' layout.
        image_model: the class of diffusers.
        image_denoiser: the model itself as a Denoiser of single frames.
        parallel: the class of the model with a ring.
        new_parallel: a new ring beside the image model, which becomes a part of the result.
        serial: the class of the model with temporal layers inside; None where there is no such model.
        new_serial: new temporal layers inside the image model, which becomes a part of the result.
    """

    part: str
    image_model: type[nn.Module]
    image_denoiser: Callable[[Any], Denoiser]
    parallel: type[Composite]
    new_parallel: Callable[[Any], Denoiser]
    serial: type[Composite] | None = None
    new_serial: Callable[[Any], Denoiser] | None = None

    @property
    def video_models(self) -> tuple[type[Composite], ...]:
        return (self.parallel,) if self.serial is None else (self.parallel, self.serial)
