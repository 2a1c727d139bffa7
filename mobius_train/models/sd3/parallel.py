"""The parallel model of Stable Diffusion 3.

The module path `mobius_train.models.sd3.parallel` is part of a file format: diffusers writes it into the
model_index.json of every saved pipeline and imports ParallelSD3 from it on loading.
"""

from __future__ import annotations

from typing import ClassVar, Self

from diffusers import ModelMixin, SD3Transformer2DModel

from mobius_train.models.parallel_model import ParallelModel
from mobius_train.models.sd3.backbone import SD3Backbone
from mobius_train.models.sd3.ring import SD3Ring
from mobius_train.ring_shape import PAPER, RingShape

# diffusers looks up ModelMixin in the module from which it imports a class.
__all__ = ["ModelMixin", "ParallelSD3"]


class ParallelSD3(ParallelModel):
    """See ParallelModel. A new model predicts the same as the transformer on every frame.

    Raises:
        MobiusError: the transformer is not supported, or the ring does not fit it.
    """

    parts: ClassVar = {"spatial": SD3Transformer2DModel, "ring": SD3Ring}
    spatial: SD3Transformer2DModel
    ring: SD3Ring

    def __init__(self, spatial: SD3Transformer2DModel, ring: SD3Ring) -> None:
        super().__init__(spatial, ring, SD3Backbone(spatial))

    @classmethod
    def from_transformer(cls, transformer: SD3Transformer2DModel, shape: RingShape = PAPER) -> Self:
        """Add a new ring to `transformer`, which becomes `spatial` and is frozen.

        Raises:
            MobiusError: the transformer is not supported, or the shape does not fit it.
        """
        return cls(transformer, SD3Ring.beside(SD3Backbone(transformer), shape))
