"""The parallel model of PixArt.

The module path `mobius_train.models.pixart.parallel` is part of a file format: diffusers writes it into the
model_index.json of every saved pipeline and imports ParallelPixArt from it on loading.
"""

from __future__ import annotations

from typing import ClassVar, Self

from diffusers import ModelMixin, PixArtTransformer2DModel

from mobius_train.models.parallel_model import ParallelModel
from mobius_train.models.pixart.backbone import PixArtBackbone
from mobius_train.models.pixart.ring import PixArtRing
from mobius_train.ring_shape import PAPER, RingShape

# diffusers looks up ModelMixin in the module from which it imports a class.
__all__ = ["ModelMixin", "ParallelPixArt"]


class ParallelPixArt(ParallelModel):
    """See ParallelModel. A new model predicts the same as the transformer on every frame.

    Raises:
        MobiusError: the transformer is not supported, or the ring does not fit it.
    """

    parts: ClassVar = {"spatial": PixArtTransformer2DModel, "ring": PixArtRing}
    spatial: PixArtTransformer2DModel
    ring: PixArtRing

    def __init__(self, spatial: PixArtTransformer2DModel, ring: PixArtRing) -> None:
        super().__init__(spatial, ring, PixArtBackbone(spatial))

    @classmethod
    def from_transformer(cls, transformer: PixArtTransformer2DModel, shape: RingShape = PAPER) -> Self:
        """Add a new ring to `transformer`, which becomes `spatial` and is frozen.

        Raises:
            MobiusError: the transformer is not supported, or the shape does not fit it.
        """
        return cls(transformer, PixArtRing.beside(PixArtBackbone(transformer), shape))
