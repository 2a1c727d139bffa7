"""The ring beside the transformer of Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import SD3Transformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from mobius_train.models.sd3.backbone import SD3Backbone, output_patches
from mobius_train.models.tokens.ring import TokenRing


class SD3Ring(TokenRing):
    """See TokenRing."""

    HEAD: ClassVar = ("norm_out", "proj_out")

    def add_head(self) -> None:
        channels = self.config.channels
        self.norm_out = AdaLayerNormContinuous(channels, channels, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(channels, self.config.patch_size**2 * self.config.out_channels)

    @classmethod
    def backbone_of(cls, config: Mapping[str, Any]) -> SD3Backbone:
        return SD3Backbone(SD3Transformer2DModel.from_config(config))

    def without_effect(self, block: nn.Module) -> list[nn.Module]:
        """See TokenRing. The last block computes no text, so it has no use for the text's queries."""
        part: Any = block
        if not part.context_pre_only:
            return []
        return [module for module in (part.attn.add_q_proj, part.attn.norm_added_q) if module is not None]

    def output_patches(self, hidden: Tensor, time: Tensor) -> Tensor:
        return output_patches(self, hidden, time)
