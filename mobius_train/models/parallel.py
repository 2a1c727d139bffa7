"""The parallel model of a 2D UNet.

The module path `mobius_train.models.parallel` is part of a file format: diffusers writes it into the
model_index.json of every saved pipeline and imports ParallelUNet from it on loading.
"""

from __future__ import annotations

from typing import ClassVar, Self

from diffusers import ModelMixin, UNet2DConditionModel

from mobius_train.errors import MobiusError
from mobius_train.models.parallel_model import ParallelModel
from mobius_train.models.unet.backbone import UNetBackbone
from mobius_train.models.unet.layers import read_layout, transformer_blocks
from mobius_train.models.unet.ring import Ring
from mobius_train.ring_shape import RingShape

# diffusers looks up ModelMixin in the module from which it imports a class.
__all__ = ["ModelMixin", "ParallelUNet"]


class ParallelUNet(ParallelModel):
    """See ParallelModel. A new model predicts the same as the 2D UNet on every frame.

    Raises:
        MobiusError: the UNet has unsupported conditions or blocks, or the ring does not fit it.
    """

    parts: ClassVar = {"spatial": UNet2DConditionModel, "ring": Ring}
    spatial: UNet2DConditionModel
    ring: Ring

    def __init__(self, spatial: UNet2DConditionModel, ring: Ring) -> None:
        backbone = UNetBackbone(spatial)
        if read_layout(ring.config) != backbone.layout:
            raise MobiusError(
                "this ring does not fit this spatial UNet: their layers differ in number or shape."
                " Make a new ring with ParallelUNet.from_unet2d"
            )
        ring.set_transformer_blocks(transformer_blocks(spatial.config))
        super().__init__(spatial, ring, backbone)

    @classmethod
    def from_unet2d(
        cls,
        unet: UNet2DConditionModel,
        ring_width: float = 1.0,
        fusion_depth: int = 0,
        tail_temporal_layers: bool = False,
        trained_tail: bool = False,
    ) -> Self:
        """Add a new ring to `unet`, which becomes `spatial` and is frozen.

        Args: see RingShape. The blocks that `fusion_depth` counts are the UNet's up blocks.

        Raises:
            MobiusError: the UNet has unsupported conditions or blocks, or the ring's shape does not fit it.
        """
        shape = RingShape(ring_width, fusion_depth, tail_temporal_layers, trained_tail)
        return cls(unet, Ring.from_unet2d(UNetBackbone(unet).unet, shape))
