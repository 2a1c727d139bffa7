"""diffusers' SD3Transformer2DModel as a backbone."""

from __future__ import annotations

from diffusers import SD3Transformer2DModel

from mobius_train.conditions import POOLED, TEXT


class SD3Backbone:
    """See Backbone. The transformer is not modified."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        self.transformer = transformer

    @property
    def latent_channels(self) -> int:
        return int(self.transformer.config.in_channels)

    @property
    def condition_widths(self) -> dict[str, int]:
        config = self.transformer.config
        return {TEXT: int(config.joint_attention_dim), POOLED: int(config.pooled_projection_dim)}
