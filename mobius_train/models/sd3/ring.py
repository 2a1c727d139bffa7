"""The ring beside the transformer of Stable Diffusion 3."""

from __future__ import annotations

from typing import ClassVar

from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from mobius_train.models.sd3.backbone import output_patches
from mobius_train.models.tokens.ring import TokenRing


class SD3Ring(TokenRing):
    """See TokenRing."""

    HEAD: ClassVar = ("norm_out", "proj_out")

    def add_head(self) -> None:
        channels = self.config.channels
        self.norm_out = AdaLayerNormContinuous(channels, channels, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(channels, self.config.patch_size**2 * self.config.out_channels)

    def output_patches(self, hidden: Tensor, time: Tensor) -> Tensor:
        return output_patches(self, hidden, time)
