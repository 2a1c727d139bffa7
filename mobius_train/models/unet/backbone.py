"""diffusers' UNet2DConditionModel as a backbone."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mobius_train.conditions import TEXT, Conditions
from mobius_train.models.backbone import Feature, LayerShape
from mobius_train.models.frames import Timestep
from mobius_train.models.unet.check import check_unet
from mobius_train.models.unet.layers import read_layout
from mobius_train.models.unet.walk import output_head, walk
from mobius_train.models.units import layer_units


class UNetBackbone:
    """See Backbone. The UNet is not modified.

    Raises:
        MobiusError: the UNet has unsupported conditions or blocks.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        check_unet(unet)
        self.unet = unet
        self.layout = read_layout(unet.config)

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def condition_widths(self) -> dict[str, int]:
        return {TEXT: int(self.unet.config.cross_attention_dim)}

    def layers(self) -> list[LayerShape]:
        return self.layout.layers()

    def features(self, sample: Tensor, timestep: Timestep, conditions: Conditions) -> Iterator[Feature]:
        dtype = self.unet.dtype
        return walk(self.unet, sample.to(dtype), timestep, conditions[TEXT].to(dtype))

    def head(self, hidden: Tensor) -> Tensor:
        return output_head(self.unet, hidden)

    def units(self) -> list[list[nn.Module]]:
        return layer_units(self.unet)
