"""The ring beside the transformer of PixArt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from mobius_train.models.pixart.backbone import PixArtBackbone, output_patches
from mobius_train.models.tokens.ring import TokenRing


class PixArtRing(TokenRing):
    """See TokenRing. Its head predicts no variance."""

    HEAD: ClassVar = ("norm_out", "scale_shift_table", "proj_out")

    def add_head(self) -> None:
        channels = self.config.channels
        self.norm_out = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, channels))
        self.proj_out = nn.Linear(channels, self.config.patch_size**2 * self.config.out_channels)

    @classmethod
    def head_of(cls, model: Any) -> dict[str, Tensor]:
        """See TokenRing. Each latent of a patch has its own rows of `proj_out`; those of the variance come last."""
        weights, latents = super().head_of(model), model.config.patch_size**2
        for name in ("proj_out.weight", "proj_out.bias"):
            rows = weights[name].unflatten(0, (latents, -1))
            weights[name] = rows[:, : model.config.in_channels].flatten(0, 1)
        return weights

    @classmethod
    def backbone_of(cls, config: Mapping[str, Any]) -> PixArtBackbone:
        return PixArtBackbone(PixArtTransformer2DModel.from_config(config))

    def output_patches(self, hidden: Tensor, time: Tensor) -> Tensor:
        return output_patches(self, hidden, time)
